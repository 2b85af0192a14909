import _checkout  # noqa: F401

from accessory.tools import evaluate_main

if __name__ == "__main__":
    evaluate_main()
