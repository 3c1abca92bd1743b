"""The reader of machine code finds products that read where nothing was put, and no others."""

from __future__ import annotations

import pytest

from .operands import astray

# In the order of the compiler that got it wrong (ptxas 12.8): UR26 should have been computed from UR18, which is made afterwards.
CODE = """
.text.forward_kernel:
        /*0000*/                   S2UR UR5, SR_CgaCtaId ;
        /*0010*/                   UMOV UR12, 0x400 ;
        /*0020*/                   ULEA UR12, UR5, UR12, 0x18 ;
        /*0030*/                   UIADD3 UR26, UP0, {source}, 0x40, URZ ;
        /*0040*/                   USHF.R.U32.HI UR18, URZ, 0x4, UR12 ;
.L_x_5:
        /*0050*/                   ULEA.HI UR16, UR12, UR4, URZ, 0x1c ;
        /*0060*/                   HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT ;
        /*0070*/                   HGMMA.64x32x16.F32 R56, R28, gdesc[UR24].tnspB, R56 ;
        /*0080*/              @P1  BRA `(.L_x_5) ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(("source", "wrong"), [
    ("UR26", ["HGMMA.64x32x16.F32 R56, R28, gdesc[UR24].tnspB, R56"]),
    ("UR12", []),
])  # fmt: skip
def test_a_descriptor_of_nothing(source: str, wrong: list[str]) -> None:
    assert astray(CODE.replace("{source}", source)) == wrong


def test_a_descriptor_that_one_of_two_ways_has_made() -> None:
    around = CODE.replace("{source}", "UR12").replace(
        "UMOV UR12, 0x400", "UMOV UR12, 0x400 ;\n/*0011*/ @P0 BRA `(.L_x_5)"
    )
    assert astray(around) == [
        "HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT",
        "HGMMA.64x32x16.F32 R56, R28, gdesc[UR24].tnspB, R56",
    ]
