"""Files: safetensors, bounded JSON, and checkpoint folders, all written atomically."""

from xuracore.io.bfloat16 import from_bfloat16, to_bfloat16
from xuracore.io.checkpoint import Checkpoint, CheckpointDirectory
from xuracore.io.safetensors import (
    SafetensorsFile,
    load_safetensors,
    load_sharded,
    open_safetensors,
    read_header,
    read_metadata,
    save_safetensors,
)
from xuracore.io.strict_json import load_json, parse_json, save_json
from xuracore.io.torch_file import TorchFile, open_torch_file

__all__ = [
    "Checkpoint",
    "CheckpointDirectory",
    "SafetensorsFile",
    "TorchFile",
    "from_bfloat16",
    "load_json",
    "load_safetensors",
    "load_sharded",
    "open_safetensors",
    "open_torch_file",
    "parse_json",
    "read_header",
    "read_metadata",
    "save_json",
    "save_safetensors",
    "to_bfloat16",
]
