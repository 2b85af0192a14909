import _checkout  # noqa: F401

from accessory.quantization.job.command import quantize_main

if __name__ == "__main__":
    quantize_main()
