from uasparse_kernels.training import main

if __name__ == "__main__":
    main()
