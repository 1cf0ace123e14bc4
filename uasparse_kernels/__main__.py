"""``python -m uasparse_kernels``: prints versions, what was built, and the backend of each op."""

import argparse
import json

from uasparse_kernels.explain import backend_info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m uasparse_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    info = backend_info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return
    backends = info.pop("backends")
    for key, value in info.items():
        print(f"{key.replace('_', ' '):20} {value if value is not None else '-'}")
    for op, devices in backends.items():
        print(f"{op:20} " + ", ".join(f"{device}: {backend}" for device, backend in devices.items()))


main()
