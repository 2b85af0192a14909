import _checkout  # noqa: F401

from accessory.tools import export_main

if __name__ == "__main__":
    export_main()
