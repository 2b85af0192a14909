import _checkout  # noqa: F401

from accessory.estimate_cli import estimate_main

if __name__ == "__main__":
    estimate_main()
