"""A very small application."""


def greeting(name: str) -> str:
    """Greet somebody."""
    return f"Hello, {name}!"


if __name__ == "__main__":
    print(greeting("world"))
