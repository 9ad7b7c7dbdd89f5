"""Start vLLM's OpenAI-compatible server on a merged checkpoint, with what its prefixes and tokens need.

    python -m open_instruct.serving.vllm_command CHECKPOINT [flags of `vllm serve`]
    python -m open_instruct.serving.vllm_command --print CHECKPOINT

`--print` only prints the command. Everything after the checkpoint goes to `vllm serve`, and wins over what stands here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from open_instruct.serving.checkpoint import read_prefixes, read_tokens

CONNECTOR = {
    "kv_connector": "PrefixConnector",
    "kv_connector_module_path": "open_instruct.serving.vllm_connector",
    "kv_role": "kv_both",
}
PROCESSOR = "open_instruct.serving.vllm_connector:Placeholders"


def flags_of(checkpoint: Path) -> list[str]:
    """Return the flags of `vllm serve` for a merged checkpoint, after checking that its prefixes are all there.

    Raises:
        ValueError: it is no merged checkpoint, or a prefix is missing or damaged.
    """
    flags = []
    if read_tokens(checkpoint):
        # Placeholders have no probability, in the log-probabilities that clients see, too.
        flags += ["--logits-processors", PROCESSOR, "--logprobs-mode", "processed_logprobs"]
    prefixes = read_prefixes(checkpoint)
    for prefix in prefixes:
        prefix.load()
    if prefixes:
        served = json.dumps({"prefixes_served": True})
        flags += ["--kv-transfer-config", json.dumps(CONNECTOR), "--default-chat-template-kwargs", served]
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; on success the process becomes the server. Exit code 2: wrong input, named in one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    only_print = words[:1] == ["--print"]
    words = words[only_print:]
    if not words or words[0].startswith("-"):
        print(__doc__, file=sys.stdout if words else sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    try:
        command = ["vllm", "serve", words[0], *flags_of(Path(words[0])), *words[1:]]
        if not only_print and importlib.util.find_spec("vllm") is None:
            raise ValueError("vLLM is not installed in this environment: pip install vllm, or --print the command")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if only_print:
        print(shlex.join(command))
        return 0
    # The program behind `vllm serve`, which builds for CPUs can't find under their own name.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *command[2:]]
    os.execv(sys.executable, server)


if __name__ == "__main__":
    sys.exit(main())
