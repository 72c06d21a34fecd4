"""Files: safetensors, bounded JSON, and checkpoint folders, all written atomically."""

from xuracore.io.checkpoint import Checkpoint, CheckpointDirectory
from xuracore.io.safetensors import load_safetensors, read_header, read_metadata, save_safetensors
from xuracore.io.strict_json import load_json, parse_json, save_json

__all__ = [
    "Checkpoint",
    "CheckpointDirectory",
    "load_json",
    "load_safetensors",
    "parse_json",
    "read_header",
    "read_metadata",
    "save_json",
    "save_safetensors",
]
