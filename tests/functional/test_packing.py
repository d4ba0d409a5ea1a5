"""The bit stream against one Python integer a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptql.functional.packing import pack, pack_levels, packed_bytes, stored_bytes, unpack, unpack_levels


def reference(row: list[int], bits: int) -> list[int]:
    """The bytes of one row by the definition: a large integer, its lowest byte first."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


def some_codes(rows: int, n: int, bits: int) -> Tensor:
    torch.manual_seed(bits * 1000 + n)
    return torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9, 16, 37, 48, 65])
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_the_definition_and_unpack_its_inverse(bits: int, n: int) -> None:
    codes = some_codes(3, n, bits)
    codes[0] = 2**bits - 1  # every bit set, the sign bit of a 64-bit word too
    stream = pack(codes, bits)
    assert stream.tolist() == [reference(row, bits) for row in codes.tolist()]
    assert stream.shape == (3, packed_bytes(n, bits))
    assert stream.is_contiguous()
    again = unpack(stream, bits, n)
    assert torch.equal(again, codes)
    assert again.is_contiguous()


def test_rows_that_are_a_view_are_packed_as_they_look() -> None:
    codes = some_codes(10, 6, 3)
    assert torch.equal(pack(codes.t(), 3), pack(codes.t().contiguous(), 3))
    assert torch.equal(pack(codes[:, 1:4], 3), pack(codes[:, 1:4].clone(), 3))
    stream = pack(codes, 3)
    wide = torch.cat([stream, stream], dim=1)
    assert torch.equal(unpack(wide[:, : stream.shape[1]], 3, 6), codes)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_nothing_packs_to_nothing(shape: tuple[int, int]) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3), 3, shape[1]), codes)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_a_width_that_no_byte_holds_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}: .* 1 to 8"):
        pack(some_codes(1, 4, 1), bits)


def test_a_stream_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes a row: 5 codes of 4 bits take 3"):
        unpack(pack(some_codes(2, 5, 3), 3), 4, 5)


def test_a_code_that_is_too_wide_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="more than 2 bits"):
        pack(torch.tensor([[0, 4]], dtype=torch.uint8), 2)


# Five and three levels


def threes(row: list[int]) -> list[int]:
    """The bytes of a row of five levels by the definition: numbers to base 5 of three digits, seven bits each."""
    row = row + [0] * (-len(row) % 3)
    return reference([sum(code * 5**i for i, code in enumerate(row[k : k + 3])) for k in range(0, len(row), 3)], 7)


def fives(row: list[int]) -> list[int]:
    """The bytes of a row of three levels by the definition: five digits of a number to base 3, the lowest first."""
    digits = "".join(map(str, row)) + "0" * (-len(row) % 5)
    return [int(digits[k : k + 5][::-1], 3) for k in range(0, len(digits), 5)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 24, 27, 64, 81])
def test_five_levels_are_packed_in_threes(n: int) -> None:
    torch.manual_seed(n)
    codes = torch.randint(0, 5, (4, n), dtype=torch.uint8)
    codes[0] = 4
    stream = pack_levels(codes, 5)
    assert stream.tolist() == [threes(row) for row in codes.tolist()]
    assert stream.shape == (4, stored_bytes(n, 5))
    assert torch.equal(unpack_levels(stream, 5, n), codes)


@pytest.mark.parametrize("n", [1, 4, 5, 6, 9, 10, 24, 64, 81])
def test_three_levels_are_packed_in_fives(n: int) -> None:
    torch.manual_seed(n)
    codes = torch.randint(0, 3, (4, n), dtype=torch.uint8)
    codes[0] = 2  # 242 in a byte
    stream = pack_levels(codes, 3)
    assert stream.tolist() == [fives(row) for row in codes.tolist()]
    assert stream.shape == (4, stored_bytes(n, 3))
    assert torch.equal(unpack_levels(stream, 3, n), codes)


def test_the_layouts_stay_as_they_are() -> None:
    """Bytes that were written before."""
    assert pack_levels(torch.tensor([[1, 2, 3, 4, 0, 4, 2]], dtype=torch.uint8), 5).tolist() == [[86, 180, 0]]
    assert pack_levels(torch.tensor([[0, 1, 2, 1, 0, 2, 2]], dtype=torch.uint8), 3).tolist() == [[48, 8]]


def test_three_levels_take_eight_fifths_of_a_bit() -> None:
    assert stored_bytes(5, 3) == 1
    assert stored_bytes(6, 3) == 2
    assert stored_bytes(5 * 400, 3) * 8 == 1.6 * 5 * 400


def test_five_levels_take_two_and_a_third_bits() -> None:
    assert stored_bytes(27, 5) * 8 == 64  # 63, and one to the whole byte
    assert stored_bytes(3 * 8 * 100, 5) * 8 == 7 / 3 * 3 * 8 * 100


@pytest.mark.parametrize("bits", range(1, 9))
def test_powers_of_two_are_packed_as_ever(bits: int) -> None:
    codes = some_codes(3, 21, bits)
    assert torch.equal(pack_levels(codes, 2**bits), pack(codes, bits))
    assert torch.equal(unpack_levels(pack(codes, bits), 2**bits, 21), codes)
    assert stored_bytes(21, 2**bits) == packed_bytes(21, bits)


@pytest.mark.parametrize("levels", [0, 1, 6, 7, 9, 512])
def test_other_grids_are_not_stored(levels: int) -> None:
    with pytest.raises(ValueError, match=rf"levels={levels}: .*2\^1 to 2\^8 levels, or 3 or 5"):
        stored_bytes(8, levels)


@pytest.mark.parametrize("levels", [3, 5])
def test_a_level_more_is_our_own_bug(levels: int) -> None:
    with pytest.raises(AssertionError, match=f"none of {levels} levels"):
        pack_levels(torch.tensor([[0, levels]], dtype=torch.uint8), levels)
