"""`python -m ci_platform` is `dynflow`."""

from ci_platform.entry import main

if __name__ == "__main__":
    main()
