"""``xura generate``: continue a text with a language model, on the terminal."""

import sys

EXAMPLES = """\
examples:
  xura generate --model mamba-130m-hf --prompt "The sea was"
  xura generate --model mamba3-siso-187m --tokenizer llama3/tokenizer.json --prompt "The sea was"
  xura generate --model mamba-130m-hf --prompt - --dtype int8 < book.txt
"""
LONG_PROMPT = 4096  # tokens from which on the reading of a prompt is reported


def add_arguments(command):
    """The options of the command."""
    command.add_argument("words", nargs="*", metavar="MODEL PROMPT", help="the same without --model and --prompt")
    command.add_argument("--model", metavar="DIR", help="folder with config.json and weights")
    command.add_argument("--prompt", metavar="TEXT", help="what to continue; - reads standard input")
    command.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, where the folder has none")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely token")
    command.add_argument("--top-k", type=int, metavar="K", help="choose among the K most likely")
    command.add_argument("--top-p", type=float, metavar="P", help="choose among those that together have P")
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X",
                         help="above 1: what is there already becomes less likely (default 1)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT",
                         help="end before this text; may be given several times")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "int8", "int4"),
                         help="how weights are stored (default: as in the folder, else float32)")
    command.add_argument("--quiet", action="store_true", help="no report of speed")


def run(args):
    """Continue a text with a language model and show it as it is made; the speed is reported on stderr.

The folder is our own, Hugging Face's (Mamba, Mamba-2, FalconMamba) or state-spaces' (Mamba-1, 2 and 3), with
the tokenizer.json of the model, or without one where tokens are bytes.  A prompt may be of any length: it is
read in pieces, at constant memory.  Ctrl-C ends the text.
"""
    from xuracore.errors import ConfigError
    from xuramamba import LanguageModel
    from xuravljepa import cli

    folder, prompt = _folder_and_prompt(args)
    tokenizer = _tokenizer(folder, args.tokenizer)
    model = LanguageModel.from_pretrained(folder, dtype=args.dtype)
    _check_vocabulary(tokenizer, model.config.vocab_size, args.tokenizer or folder)
    ids = _encoded(tokenizer, sys.stdin.read() if prompt == "-" else prompt)
    if not len(ids):
        raise ConfigError("the prompt is empty")
    stop = model.config.eos_token_ids or _end_of_text(tokenizer)
    with cli.compiling_notice():
        model.generate(ids[None, :2], 2, stop=())  # compiles, so that what is timed below is not that
    screen = _Screen(tokenizer, args.stop)
    if prompt != "-":
        screen.write(prompt)
    made = model.generate(
        ids[None], args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, stop, screen.show,
        repetition_penalty=args.repetition_penalty, stop_strings=args.stop, tokenizer=tokenizer, details=True,
        progress=_progress if len(ids) > LONG_PROMPT and not args.quiet else None)
    screen.end()
    if not args.quiet:
        print(_report(made), file=sys.stderr)
    return 130 if made.reasons == ("interrupted",) else 0


def _folder_and_prompt(args):
    from xuracore.errors import ConfigError

    words = list(args.words)
    folder = args.model or (words.pop(0) if words else None)
    prompt = args.prompt if args.prompt is not None else words.pop(0) if words else None
    if folder is None or prompt is None or words:
        raise ConfigError("give one folder and one prompt: xura generate --model DIR --prompt TEXT")
    return folder, prompt


def _tokenizer(folder, path):
    """That of the folder, or of ``path``; that of bytes where the vocabulary is one of bytes."""
    from pathlib import Path

    from xuracore.errors import ConfigError
    from xuramamba.byte_tokenizer import VOCABULARY_SIZE, ByteTokenizer
    from xuramamba.pretrained import read_config
    from xuramamba.tokenizer import load_tokenizer

    if path is not None:
        return load_tokenizer(path)
    config = read_config(folder)  # says what is wrong with a folder that is none
    if any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return load_tokenizer(folder)
    vocabulary = config.get("vocab_size")
    if type(vocabulary) is int and 256 <= vocabulary <= VOCABULARY_SIZE:
        return ByteTokenizer()
    if type(vocabulary) is not int:
        return None  # reading the model tells what is missing
    raise ConfigError(f"{folder}: a vocabulary of {vocabulary} is not that of bytes, and the folder holds no "
                      "tokenizer.json; give the one that belongs to the model with --tokenizer")


def _check_vocabulary(tokenizer, vocabulary, source):
    from xuracore.errors import ConfigError
    from xuramamba.byte_tokenizer import ByteTokenizer

    largest = 256 if isinstance(tokenizer, ByteTokenizer) else tokenizer.vocabulary_size
    if largest > vocabulary:
        raise ConfigError(f"{source}: the tokenizer has ids up to {largest - 1}, the model a vocabulary of "
                          f"{vocabulary}; this is not the model's tokenizer")


def _encoded(tokenizer, text):
    """Ids, with what the tokenizer puts before a text, and not what it puts behind."""
    import numpy as np

    from xuramamba.tokenizer import ExternalTokenizer

    if isinstance(tokenizer, ExternalTokenizer):
        return tokenizer.encode(text, add_special=True)
    before = getattr(tokenizer, "template", ((), ()))[0]
    return np.concatenate([np.array(before, np.int64), tokenizer.encode(text)])


def _end_of_text(tokenizer):
    from xuramamba.byte_tokenizer import EOS, ByteTokenizer

    if isinstance(tokenizer, ByteTokenizer):
        return (EOS,)
    return tuple(i for i in map(tokenizer.id_of, ("<|endoftext|>", "<|end_of_text|>", "</s>")) if i is not None)


class _Screen:
    """Text as it comes; on a terminal, without anything that could move the cursor."""

    def __init__(self, tokenizer, stop):
        self._stream, self._bare = tokenizer.stream(stop), not sys.stdout.isatty()

    def write(self, text):
        from xuravljepa import cli

        if not self._bare:
            text = "\n".join(cli.printable(line.replace("\t", "    ")) for line in text.split("\n"))
        sys.stdout.write(text)
        sys.stdout.flush()

    def show(self, ids):
        """For generate's ``stream``."""
        try:
            self.write(self._stream.push(ids[0]))
        except UnicodeEncodeError:  # a terminal that has no such letter
            self.write("?")

    def end(self):
        self.write(self._stream.finish() + "\n")


def _progress(done, total):
    print(f"\rreading the prompt: {done:,} of {total:,} tokens", end="\n" if done == total else "",
          file=sys.stderr, flush=True)


def _report(made):
    reading = made.prompt_tokens / max(made.prefill_seconds, 1e-9)
    # The first token comes from the prompt's last logits: decoding it costs no step of the model.
    steps = max(made.new_tokens - 1, 0)
    writing = f", {steps / made.decode_seconds:.1f} tokens/s" if steps and made.decode_seconds else ""
    return (f"prompt {made.prompt_tokens:,} tokens in {made.prefill_seconds:.2f} s, {reading:.1f} tokens/s; "
            f"new {made.new_tokens:,} tokens in {made.decode_seconds:.2f} s{writing}; ended by {made.reasons[0]}")
