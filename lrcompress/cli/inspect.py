"""stub"""
def inspect() -> None:
    """stub"""
