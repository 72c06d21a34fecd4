"""``xura chat``: questions about pictures, one line after the other, on a terminal or from a pipe."""

import contextlib
import os
import sys

EXAMPLES = """\
examples:
  xura chat scene.png
  xura chat --memory seen
  printf ':image scene.png\\nhow many circles are there?\\n' | xura chat
"""
HELP = """\
a question        is answered about the picture
:image FILE       look at another picture; the name of a file alone does the same
:trace            how the last answer came about
:tools            what can be called in doubt
:save FILE        write what was seen last
:load FILE        go on from there, in this or another chat
:memory           what was seen, newest first (needs --memory DIR)
:memory QUESTION  ask the pictures that were seen
:help             this list
:quit             the end; so is Ctrl-D"""
MAX_LINE = 10_000  # characters
LISTED = 10  # memories


def add_arguments(command):
    """The options of the command."""
    command.add_argument("image", nargs="?", metavar="IMAGE", help="the picture to begin with")
    command.add_argument("--memory", metavar="DIR", help="remember pictures there, and search what is there")


def run(args):
    """Talk about pictures: a line is a question, or a command that begins with a colon (:help lists them).

The picture stays in view from turn to turn, and with --memory all pictures can be asked about later.  From a
pipe the lines are answered without a prompt, and the exit code is 1 if one of them failed.
"""
    from xuravljepa.agent.agent import Agent

    agent = Agent.from_pretrained(args.model)
    if args.memory:
        agent.open_memory(args.memory)
    try:
        chat = Chat(agent)
        if args.image:
            chat.image(args.image)
        return chat.talk()
    finally:
        agent.tools.close()
        if agent.memory is not None:
            agent.memory.close()


class Chat:
    """One conversation; methods named as a command carry it out, with the rest of its line."""

    COMMANDS = ("image", "trace", "tools", "save", "load", "memory", "help", "quit")

    def __init__(self, agent):
        self.agent, self.reply, self.failed, self.over, self.seen = agent, None, False, False, False
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def talk(self):
        """Read lines until the end; the exit code."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  editing and history of lines: importing it is enough
            print("Ask about a picture; :help lists the commands.")
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        while not self.over:
            try:
                line = self._line()
                if line is None:
                    break
                if line.strip():
                    self._turn(line.strip())
            except KeyboardInterrupt:  # on a terminal it ends the answer, not the chat
                if not self.interactive:
                    raise
                print("\n(interrupted; :quit ends the chat)")
        return int(self.failed and not self.interactive)

    def _line(self):
        if not self.interactive:
            return sys.stdin.readline(MAX_LINE) or None
        try:
            return input("> ")[:MAX_LINE]
        except EOFError:
            print()
            return None

    def _turn(self, line):
        from xuracore.errors import XuraError
        from xuravljepa import cli

        try:
            if line.startswith(":"):
                self._command(*line[1:].split(None, 1))
            elif line.lower() in ("help", "/help", "?", "quit", "/quit", "exit"):  # what people try first
                self._command("help" if line.lower().lstrip("/") in ("help", "?") else "quit")
            elif os.path.isfile(line):
                self.image(line)
            else:
                self.ask(line)
        except (XuraError, OSError) as error:
            self.failed = True
            sys.stdout.flush()
            print(f"error: {cli.one_line(error)}", file=sys.stderr, flush=True)

    def _command(self, name="", rest=""):
        from xuracore.errors import ConfigError

        found = [command for command in self.COMMANDS if name and command.startswith(name)]
        if len(found) != 1:
            raise ConfigError(f"there is no command :{name}; :help lists them")
        if found[0] in ("image", "save", "load") and not rest:
            raise ConfigError(f":{found[0]} needs the name of a file")
        getattr(self, found[0])(rest.strip())

    # ------------------------------------------------------------------ turns
    def ask(self, question):
        from xuracore.errors import ConfigError
        from xuravljepa import cli

        self.agent.model.query_tokens([question])  # what is wrong with the question comes first
        if not self.seen:
            raise ConfigError("there is no picture yet: type the name of its file; :help lists the commands")
        with cli.compiling_notice():
            self.reply = self.agent.ask(None, question)
        print(f"{self.reply.text}  ({cli.how(self.reply, self.agent.trained)})", flush=True)

    def image(self, path):
        from xuravljepa import cli

        with cli.compiling_notice():
            self.agent.look(path)
            if self.agent.memory is not None:
                self.agent.remember(source=path)
        self.seen = True
        print(f"looking at {cli.printable(path)}", flush=True)

    def trace(self, _):
        from xuracore.errors import ConfigError

        if self.reply is None:
            raise ConfigError("nothing was asked yet")
        self.reply.trace.show()

    def tools(self, _):
        from xuravljepa import cli

        for tool in self.agent.tools:
            print(f"{tool.name}({', '.join(tool.parameters)})  {cli.printable(tool.description)}")
        if self.agent.tools.is_empty():
            print("no tools")

    def save(self, path):
        self.agent.save_state(path)
        print("saved")

    def load(self, path):
        self.agent.load_state(path)
        self.seen = True
        print("loaded: the picture is in view again")

    def memory(self, question):
        from xuracore.errors import ConfigError
        from xuravljepa import cli
        from xuravljepa.agent.recall import clock_text

        if self.agent.memory is None:
            raise ConfigError("there is no memory: start with xura chat --memory DIR")
        if question:
            lines = map(str, self.agent.recall(question, LISTED))
        else:
            lines = (f"{clock_text(entry.last)}  {entry.source}" for entry in self.agent.memory.newest(LISTED))
        lines = [cli.printable(line) for line in lines]
        print("\n".join(lines or ["nothing was seen yet"]), flush=True)

    def help(self, _):
        print(HELP)

    def quit(self, _):
        self.over = True
