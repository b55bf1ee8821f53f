"""Ask AdapterSentry about the audit's adapters, by weights alone; write docs/audit_peer.json.

    pip install adaptersentry==2.0.2    # in an environment of its own, or beside lens_lora
    python -m benchmarks.audit.peer --adapters FOLDER

AdapterSentry asks whether an adapter looks unlike others; it names no word. Two of its answers are
stored for each adapter: what it would do with the adapter, and the number that this rests on. That
is how concentrated the update of a module is on few outputs, beside modules of the same kind in the
same adapter.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from adaptersentry import scan  # pyright: ignore[reportMissingImports]

NUMBERS = Path(__file__).parents[2] / "docs" / "audit_peer.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="AdapterSentry on the audit's adapters.")
    parser.add_argument("--adapters", type=Path, required=True)
    files = sorted(parser.parse_args().adapters.glob("*/adapter_model.safetensors"))
    found = {}
    for file in files:
        said = json.loads(scan(file).model_dump_json())
        spread = said["anomaly"]["intra"]["max_concentration_z"]
        found[file.parent.name] = {
            "action": said["verdict"]["action"],
            "concentration": round(spread, 3),
        }
    about = {"adaptersentry": version("adaptersentry"), "adapters": found}
    NUMBERS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
