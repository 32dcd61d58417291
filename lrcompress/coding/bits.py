"""Short lists of numbers as bits: Elias gamma and plain binary, most significant bit first."""

from lrcompress.errors import InputError


class BitWriter:
    """Collects numbers; `data` is them in bytes, the last one filled up with zeros."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def gamma(self, value: int) -> None:
        """A number from 1 up, in 2 floor(log2 value) + 1 bits."""
        digits = f"{value:b}"
        self._pieces.append("0" * (len(digits) - 1) + digits)

    def signed(self, value: int) -> None:
        """Any number, by gamma, those near zero shortest."""
        self.gamma(2 * value + 1 if value >= 0 else -2 * value)

    def binary(self, value: int, width: int) -> None:
        """A number from 0 up to 2^width - 1."""
        if width:
            self._pieces.append(f"{value:0{width}b}")

    def text(self) -> str:
        """The bits as characters."""
        return "".join(self._pieces)

    @property
    def data(self) -> bytes:
        """The bits in bytes."""
        text = self.text()
        text += "0" * (-len(text) % 8)
        return int(text or "0", 2).to_bytes(len(text) // 8, "big")


class BitReader:
    """Reads what a BitWriter wrote; beyond the end is an InputError."""

    def __init__(self, text: str) -> None:
        self._text, self.at = text, 0

    @classmethod
    def of(cls, data: bytes) -> "BitReader":
        """Of whole bytes."""
        return cls(f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else "")

    def gamma(self) -> int:
        """A number from 1 up, below 2^35."""
        one = self._text.find("1", self.at, self.at + 35)
        if one < 0:
            raise InputError("the coded stream is damaged: it ends within a number")
        zeros = one - self.at
        self.at = one
        return self.binary(zeros + 1)

    def signed(self) -> int:
        """Any number."""
        value = self.gamma()
        return value >> 1 if value & 1 else -(value >> 1)

    def binary(self, width: int) -> int:
        """A number of `width` bits."""
        if self.at + width > len(self._text):
            raise InputError("the coded stream is damaged: it ends within a number")
        self.at += width
        return int(self._text[self.at - width : self.at] or "0", 2)
