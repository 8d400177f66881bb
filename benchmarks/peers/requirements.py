"""What a wheel requires, but for torch and its companions: requirements of pip, one a line.

Usage: python requirements.py WHEEL
"""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser

LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    for line in required:
        package = line.partition(";")[0].partition(">")[0].partition("=")[0].partition("<")[0].partition("!")[0].strip()
        if package not in LEFT_OUT and "extra ==" not in line:
            print(line)


if __name__ == "__main__":
    main()
