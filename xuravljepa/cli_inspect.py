"""``xura inspect``: what is in a model folder or a file of weights, by its headers alone."""

import json
import math

MOST_PARTS = 30


def add_arguments(command):
    """The options of the command."""
    command.add_argument("path", metavar="PATH")
    command.add_argument("--summary", action="store_true", help="totals only")
    command.add_argument("--json", action="store_true", help="as one JSON object")


def run(args):
    """List tensors, shapes, types, sizes and metadata of a model folder, a safetensors file or a torch file.

Nothing but headers and configurations is read, and every file is checked before it is believed; damaged or
hostile ones are refused with the reason.
"""
    from xuravljepa.cli import printable

    found = _examine(args.path)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    licence = f", licence: {printable(found['licence'])}" if "licence" in found else ""
    print(f"{printable(str(args.path))}: {found['kind']}{licence}")
    for name, config in () if args.summary else found["configs"].items():
        print(f"\n{name}")
        print("\n".join(_setting_lines(config)))
    for name, file in found["files"].items():
        types = ", ".join(sorted({entry["dtype"] for entry in file["tensors"].values()}))
        print(f"\n{printable(name)}: {len(file['tensors'])} tensors, {file['parameters']:,} numbers, "
              f"{file['bytes'] / 1e6:.2f} MB, {types or 'empty'}")
        for key, value in file["metadata"].items():
            print(f"  {printable(key)} = {printable(value)}")
        for line in _tree(file["tensors"]):
            print(f"  {line}")
        if not args.summary:
            width = max(map(len, file["tensors"]), default=0)
            for tensor, entry in file["tensors"].items():
                shape = " × ".join(map(str, entry["shape"])) or "a number"
                print(f"  {tensor:{width}}  {entry['dtype']:4s}  {shape}")


def _examine(path):
    """{"kind", "configs": {file: data}, "files": {file: {"tensors", "parameters", "bytes", "metadata"}}}."""
    from pathlib import Path

    from xuracore import io
    from xuracore.errors import FormatError
    from xuravljepa.cli import printable
    from xuravljepa.vit_files import read_licence

    path = Path(path)
    found = {"kind": "torch file" if path.suffix == ".bin" else "safetensors file", "configs": {}, "files": {}}
    sources = {path.name: path}
    if path.is_dir():
        sources = {file.name: file for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])}
        if (path / "model.safetensors.index.json").is_file():
            sources = {"model.safetensors.index.json": path / "model.safetensors.index.json"}
        if not sources:
            raise FormatError("holds no .safetensors file, and no .bin file", path)
        for name in ("config.json", "params.json", "agent.json"):
            if (path / name).is_file():
                found["configs"][name] = io.load_json(path / name, allow_infinity=True)
        config = found["configs"].get("config.json", found["configs"].get("params.json"))
        kind = config.get("model_type", "unknown type") if isinstance(config, dict) else "no config.json"
        found["kind"] = f"folder of a model ({printable(str(kind))[:80]})"
        licence = read_licence(path, config)
        found |= {} if licence is None else {"licence": licence}
    for name, source in sources.items():
        found["files"][name] = _torch_file(source) if source.suffix == ".bin" else _safetensors_file(source)
    return found


def _safetensors_file(source):
    from xuracore import io

    header = io.read_header(source)
    entries = {tensor: (entry.dtype, entry.shape) for tensor, entry in header.tensors.items()}
    return _facts(entries, sum(entry.bytes for entry in header.tensors.values()), header.metadata)


def _torch_file(source):
    from xuracore import io

    with io.open_torch_file(source) as file:
        return _facts({name: (file.dtype(name), file.shape(name)) for name in file.keys()}, source.stat().st_size, {})


def _facts(entries, total, metadata):
    tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in sorted(entries.items())}
    numbers = sum(math.prod(shape) for _, shape in entries.values())
    return {"tensors": tensors, "parameters": numbers, "bytes": total, "metadata": metadata}


def _tree(tensors, levels=3):
    """The parts of a model with how many numbers each has; layers that are counted stand as one line.

    Nothing where the names do not divide the tensors into a few parts.
    """
    counted = [(name.split("."), math.prod(entry["shape"])) for name, entry in tensors.items()]
    tops = {words[0] for words, _ in counted}
    if not tops or len(tops) > min(MOST_PARTS, len(counted) - 1):
        return []
    return list(_branches(counted, levels, ""))


def _branches(counted, levels, indent):
    parts = {}
    for words, count in counted:
        parts.setdefault(words[0], []).append((words[1:], count))
    for name, members in parts.items():
        inner = [(words, count) for words, count in members if words]
        numbered = inner and all(words[0].isdigit() for words, _ in inner)
        times = f" × {len({words[0] for words, _ in inner})}" if numbered else ""
        yield f"{indent}{name}{times}: {sum(count for _, count in members):,}"
        if levels > 1 and len({words[0] for words, _ in inner}) > 1:
            inside = [(words[1:], count) for words, count in inner if words[1:]] if numbered else inner
            if len({words[0] for words, _ in inside}) <= MOST_PARTS:
                yield from _branches(inside, levels - 1, indent + "  ")


def _setting_lines(config, indent="  "):
    from xuravljepa.cli import printable

    if not isinstance(config, dict):
        config = {"value": config}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{printable(str(key))}"
            yield from _setting_lines(value, indent + "  ")
        else:
            text = printable(json.dumps(value, ensure_ascii=False))
            yield f"{indent}{printable(str(key))} = {text if len(text) <= 100 else text[:99] + '…'}"
