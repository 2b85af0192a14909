import _checkout  # noqa: F401

from accessory.quantize_cli import quantize_main

if __name__ == "__main__":
    quantize_main()
