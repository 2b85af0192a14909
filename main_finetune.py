from accessory.cli import finetune_main

if __name__ == "__main__":
    finetune_main()
