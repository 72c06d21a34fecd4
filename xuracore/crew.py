"""Hands the parts of a kernel to threads that wait awake: within a microsecond instead of tens.

Putting a thread to sleep and waking it through Python takes longer than many a kernel runs.  So a worker that has
just done something watches its *box*, a word of shared memory, for some hundred microseconds before it sleeps.  A
kernel that is to be shared lays its arguments down on the stack, in a *task*, and writes the task's address
into the boxes of the workers that watch.  Then everybody, the caller first, fetches the number of the next part
from the task until there is none.  A worker that was not quick enough finds its box empty again: nobody waits for
a thread that the system has set aside before it began.

Everything here that Numba compiles is built by :func:`build`, which gets Numba as an argument: only
:mod:`xuracore.jit` imports it.
"""

import platform
import sys

ASLEEP, WATCHING, BUSY = range(3)  # states of a box; any other is the address of a task
BOX_WORDS = 16  # two cache lines: neighbours must not share one
LEAVE = 8  # byte offset of the word that calls a watching worker back to Python
PROCESSOR = 16  # byte offset of the word that says where the worker was last
NEXT, LEFT, PARTS, RANGE, KERNEL, FUNCTION, FAILED, ARGUMENTS = range(8)  # words of a task; the arguments follow
MOST_WORKERS = 62  # that share a task: a word has a bit for each
WATCHES = 4000  # looks at the box, some 20 to 40 ns each, before a worker sleeps
PATIENCE = 2000  # looks at those who are still busy, before the caller lets others have the processor

# What a launch returns: nobody watches; done; done, but the workers wait for the processor that the caller has;
# a part failed.
ALONE, SHARED, CROWDED, BROKEN = range(4)


def build(numba, ir):
    """(watch, launch_body): plain Python functions for Numba to compile.

    watch(box) : what a worker does between its jobs; the box is WATCHING before, so that a task may come at once.
    launch_body(task, boxes, workers) : shares a task that was laid down.
    """
    whole = numba.core.types.int64
    word = ir.IntType(64)
    function_type = ir.FunctionType(ir.VoidType(), [word])

    def pointer(builder, address):
        return builder.inttoptr(address, word.as_pointer())

    def intrinsic(signature, write):
        return signature, lambda context, builder, _, values: write(context, builder, *values)

    @numba.extending.intrinsic
    def load(typing_context, address):
        return intrinsic(whole(whole), lambda _, builder, address: builder.load_atomic(
            pointer(builder, address), "acquire", 8))

    @numba.extending.intrinsic
    def store(typing_context, address, value):
        def write(context, builder, address, value):
            builder.store_atomic(value, pointer(builder, address), "release", 8)
            return context.get_dummy_value()

        return intrinsic(numba.core.types.void(whole, whole), write)

    @numba.extending.intrinsic
    def exchange(typing_context, address, expected, value):
        """Whether the word held ``expected``; then it holds ``value`` now."""

        def write(context, builder, address, expected, value):
            pair = builder.cmpxchg(pointer(builder, address), expected, value, "acq_rel", "acquire")
            return builder.extract_value(pair, 1)

        return intrinsic(numba.core.types.boolean(whole, whole, whole), write)

    @numba.extending.intrinsic
    def work(typing_context, function, task):
        def write(context, builder, function, task):
            builder.call(builder.inttoptr(function, function_type.as_pointer()), [task])
            return context.get_dummy_value()

        return intrinsic(numba.core.types.void(whole, whole), write)

    @numba.extending.intrinsic
    def pause(typing_context):
        def write(context, builder):
            if platform.machine().lower() in ("x86_64", "amd64"):
                kind = ir.FunctionType(ir.VoidType(), [])
                builder.call(numba.core.cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
            return context.get_dummy_value()

        return intrinsic(numba.core.types.void(), write)

    @numba.extending.intrinsic
    def give_way(typing_context):
        def write(context, builder):
            if not sys.platform.startswith("win"):
                kind = ir.FunctionType(ir.IntType(32), [])
                builder.call(numba.core.cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
            return context.get_dummy_value()

        return intrinsic(numba.core.types.void(), write)

    @numba.extending.intrinsic
    def processor(typing_context):
        """The number of the one that this runs on, -1 where that is not known."""

        def write(context, builder):
            if not sys.platform.startswith("linux"):
                return ir.Constant(word, -1)
            kind = ir.FunctionType(ir.IntType(32), [])
            number = builder.call(numba.core.cgutils.get_or_insert_function(builder.module, kind, "sched_getcpu"), [])
            return builder.sext(number, word)

        return intrinsic(whole(), write)

    def watch(box):
        looks = 0
        while True:
            state = load(box)
            if state == WATCHING:
                looks += 1
                store(box + PROCESSOR, processor())
                if (looks > WATCHES or load(box + LEAVE)) and exchange(box, WATCHING, ASLEEP):
                    return
                pause()
            elif exchange(box, state, BUSY):
                work(load(state + 8 * FUNCTION), state)  # the task is gone once this has counted itself out
                store(box, WATCHING)
                looks = 0

    def share(task, boxes, workers):
        asked = 0  # bit i: box i was given the task
        for i in range(workers):
            if exchange(boxes + 8 * BOX_WORDS * i, WATCHING, task):
                asked |= 1 << i
        if asked == 0:
            return ALONE
        work(load(task + 8 * FUNCTION), task)
        expected, crowded, here = 1, False, processor()
        for i in range(workers):
            box = boxes + 8 * BOX_WORDS * i
            if asked >> i & 1 and not exchange(box, task, WATCHING):
                expected += 1
            elif asked >> i & 1 and here >= 0 and load(box + PROCESSOR) == here:
                crowded = True
        looks = 0
        while load(task + 8 * LEFT) != expected:
            pause()
            looks += 1
            if looks > PATIENCE:
                give_way()
        if load(task + 8 * FAILED):
            return BROKEN
        return CROWDED if crowded else SHARED

    return watch, share


def lay_down(numba, ir):
    """The intrinsic ``lay_down(kernel, parts, range, arguments)``: the address of a task on the caller's stack.

    kernel : address of a compiled function of two numbers and the arguments; ``range`` is -1 where these are part
    and parts, else the count of tasks of which they are start and stop.
    """
    types, cgutils = numba.core.types, numba.core.cgutils
    word, index = ir.IntType(64), ir.IntType(32)

    @numba.extending.intrinsic
    def lay_down(typing_context, kernel, parts, tasks, arguments):
        kinds = tuple(arguments)
        taken = (types.int64, types.int64, *kinds)

        def write(context, builder, signature, values):
            kernel, parts, tasks, packed = values
            given = cgutils.unpack_tuple(builder, packed, len(kinds))
            layout = ir.LiteralStructType([word] * ARGUMENTS + [value.type for value in given])

            def field(builder, task, number):
                return builder.gep(task, [ir.Constant(index, 0), ir.Constant(index, number)], inbounds=True)

            def write_function():
                """void function(task): do parts until there are none."""
                kind = ir.FunctionType(ir.VoidType(), [word])
                function = ir.Function(builder.module, kind, builder.module.get_unique_name("parts_of_a_task"))
                function.linkage = "internal"
                body = ir.IRBuilder(function.append_basic_block())
                task = body.inttoptr(function.args[0], layout.as_pointer())
                parts, tasks = (body.load(field(body, task, number)) for number in (PARTS, RANGE))
                inputs = [body.load(field(body, task, ARGUMENTS + i)) for i in range(len(kinds))]
                form = context.call_conv.get_function_type(types.none, taken)
                kernel = body.inttoptr(body.load(field(body, task, KERNEL)), form.as_pointer())
                fetch, do, end = (function.append_basic_block() for _ in range(3))
                body.branch(fetch)
                body.position_at_end(fetch)
                part = body.atomic_rmw("add", field(body, task, NEXT), ir.Constant(word, 1), "acq_rel")
                body.cbranch(body.icmp_signed("<", part, parts), do, end)
                body.position_at_end(do)
                whole = body.icmp_signed("<", tasks, ir.Constant(word, 0))
                following = body.add(part, ir.Constant(word, 1))
                start, stop = (body.sdiv(body.mul(tasks, number), parts) for number in (part, following))
                bounds = body.select(whole, part, start), body.select(whole, parts, stop)
                status, _ = context.call_conv.call_function(body, kernel, types.none, taken, [*bounds, *inputs])
                failed = body.zext(status.is_error, word)
                body.atomic_rmw("or", field(body, task, FAILED), failed, "acq_rel")
                body.branch(fetch)
                body.position_at_end(end)
                body.atomic_rmw("add", field(body, task, LEFT), ir.Constant(word, 1), "acq_rel")
                body.ret_void()
                return function

            zero = ir.Constant(word, 0)
            head = {NEXT: zero, LEFT: zero, PARTS: parts, RANGE: tasks, KERNEL: kernel, FAILED: zero,
                    FUNCTION: builder.ptrtoint(write_function(), word)}  # fmt: skip
            task = cgutils.alloca_once(builder, layout)
            for number, value in [*head.items(), *enumerate(given, ARGUMENTS)]:
                builder.store(value, field(builder, task, number))
            return builder.ptrtoint(task, word)

        return types.int64(types.int64, types.int64, types.int64, arguments), write

    return lay_down
