"""Numbers in messages."""


def counted(number: int, noun: str) -> str:
    """A number of things, such as "1 image", "1,203 images" or "2 classes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
