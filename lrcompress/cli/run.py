"""stub"""
def run() -> None:
    """stub"""
