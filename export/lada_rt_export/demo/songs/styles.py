"""Five styles as data: instruments, grooves and words. No two share drums, bass line, harmony part and lead.

A bar has sixteen steps. Drum and chord patterns: `X` accent, `x` stroke, `o` ghost, `.` rest, one bar or two.
Bass: `step:steps:tone` with R root, 3, 5, 8 octave and a for a step towards the next root. Arpeggio: the
digit is the voice of the chord, from below.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STYLES", "Part", "Style"]


@dataclass(frozen=True, slots=True)
class Part:
    """How a pitched part sits in the mix: one of `instruments`, pan -1 to 1, level and reverb send in dB."""

    instruments: tuple[str, ...]
    pan: float
    gain_db: float
    send_db: float


@dataclass(frozen=True, slots=True)
class Style:
    """A style. `calm` and `full` are drum patterns of verse-like and chorus-like sections, in variants;
    `swing` delays odd steps (in steps), `pump` is how far the bass drum ducks the pads."""

    name: str
    tempo_low: float
    tempo_high: float
    sevenths: float
    swing: float
    calm: tuple[dict[str, str], ...]
    full: tuple[dict[str, str], ...]
    bass_lines: tuple[str, ...]
    bass: Part
    comp_patterns: tuple[str, ...]
    comp_steps: int
    comp_centre: int
    comp: Part
    arp_patterns: tuple[str, ...]
    arp_steps: int
    arp_centre: int
    arp: Part
    pad: Part
    pad_calm: bool
    lead: Part
    fill: dict[str, str]
    drums_db: float
    hall_s: float
    pump: float
    names: tuple[str, ...]
    features: tuple[str, ...]


SYNTHPOP = Style(
    name="synthpop",
    tempo_low=92,
    tempo_high=140,
    sevenths=0.15,
    swing=0.0,
    calm=(
        {"kick808": "X...X...X...X...", "hat": "..x...x...x...x."},
        {"kick808": "X...X...X...X...", "hat": "..x...x...x...x.", "clap": "....x.......x..."},
    ),
    full=(
        {
            "kick808": "X...X...X...X...",
            "clap": "....X.......X...",
            "hat": "o.o.o.o.o.o.o.o.",
            "open_hat": "..x...x...x...x.",
        },
        {
            "kick808": "X...X...X...X...",
            "clap": "....X.......X..o",
            "hat": "oxoooxoooxoooxoo",
            "open_hat": "..x...x...x...x.",
        },
    ),
    bass_lines=(
        "0:2:R 2:2:R 4:2:R 6:2:R 8:2:R 10:2:R 12:2:R 14:2:R",
        "0:2:R 2:2:8 4:2:R 6:2:8 8:2:R 10:2:8 12:2:R 14:2:8",
        "2:2:R 3:1:R 6:2:R 7:1:R 10:2:R 11:1:R 14:2:8",
    ),
    bass=Part(("synth_bass",), 0.0, -1.0, -40),
    comp_patterns=("X.....x.....x...", "X..x..x.........", "..x...x...x...x."),
    comp_steps=2,
    comp_centre=64,
    comp=Part(("synth_pluck",), -0.3, -7.0, -14),
    arp_patterns=("0.1.2.3.2.1.2.1.", "0120120120123210", "3.2.1.0.3.2.1.2."),
    arp_steps=2,
    arp_centre=74,
    arp=Part(("synth_pluck",), 0.35, -9.0, -12),
    pad=Part(("saw_pad",), 0.0, -8.0, -12),
    pad_calm=True,
    lead=Part(("synth_lead",), 0.1, -5.0, -10),
    fill={"snare": "........x.x.xxxx", "clap": "....X.......X..."},
    drums_db=-5.0,
    hall_s=1.8,
    pump=0.5,
    names=("synth-pop", "electropop", "eighties synth-pop", "dance pop"),
    features=(
        "four-on-the-floor kick",
        "pulsing synth bass",
        "bright saw pads",
        "arpeggiated synths",
        "electronic claps",
    ),
)

BALLAD = Style(
    name="ballad",
    tempo_low=70,
    tempo_high=105,
    sevenths=0.25,
    swing=0.0,
    calm=(
        {},
        {"shaker": "o.o.x.o.o.o.x.o."},
    ),
    full=(
        {"kick": "x.........x.....", "brush": "....x.......x...", "shaker": "o.o.o.o.o.o.o.o."},
        {"kick": "x.......x.......", "rim": "....x.......x...", "shaker": "x.o.x.o.x.o.x.o."},
    ),
    bass_lines=("0:8:R 8:8:5", "0:12:R 12:4:5", "0:6:R 6:2:5 8:8:R"),
    bass=Part(("upright_bass", "finger_bass"), 0.0, -2.0, -26),
    comp_patterns=("X.......x.......", "X.........x.....", "X..............."),
    comp_steps=8,
    comp_centre=60,
    comp=Part(("piano",), -0.2, -5.0, -12),
    arp_patterns=("0.2.1.3.2.1.3.2.", "0.1.2.3.2.1.2.1.", "0.3.2.1.0.3.2.1."),
    arp_steps=4,
    arp_centre=58,
    arp=Part(("steel_guitar",), 0.25, -1.0, -14),
    pad=Part(("strings",), 0.0, -8.0, -9),
    pad_calm=False,
    lead=Part(("piano", "flute"), -0.1, -3.0, -9),
    fill={"tom_low": "............x...", "brush": "....x.....x.x.x."},
    drums_db=-1.0,
    hall_s=2.3,
    pump=0.0,
    names=("acoustic ballad", "folk ballad", "singer-songwriter ballad", "unplugged folk"),
    features=(
        "fingerpicked acoustic guitar",
        "soft piano",
        "warm strings",
        "gentle brushes",
        "intimate and sparse",
    ),
)

FUNK = Style(
    name="funk",
    tempo_low=84,
    tempo_high=122,
    sevenths=0.9,
    swing=0.12,
    calm=(
        {"kick": "X..x..x...x.....", "snare_tight": "....X..o.o..X...", "hat": "x.o.x.o.x.o.x.o."},
        {"kick": "X.....x..x......", "snare_tight": "....X.......X..o", "hat": "xoxoxoxoxoxoxoxo"},
    ),
    full=(
        {
            "kick": "X..x..x...x..x..",
            "snare_tight": "....X..o.o..X..o",
            "hat": "xoxoxoxoxoxox.xo",
            "open_hat": ".............x..",
        },
        {"kick": "X.x...x..xx.....", "snare_tight": "....X..o.o.oX...", "hat": "xoxoxoxoxoxoxoxo"},
    ),
    bass_lines=(
        "0:3:R 3:2:R 6:1:8 7:2:R 10:2:5 12:1:8 14:2:a",
        "0:2:R 3:1:R 4:2:8 7:1:5 8:2:R 11:1:R 13:1:5 14:2:a",
        "0:4:R 6:2:8 8:1:R 10:1:R 11:2:5 14:1:R 15:1:a",
    ),
    bass=Part(("finger_bass",), 0.0, 0.0, -40),
    comp_patterns=("X..x..x...x..x..", "..x..x....x..x..", "X.....x..x......"),
    comp_steps=3,
    comp_centre=62,
    comp=Part(("electric_piano",), -0.3, -3.0, -18),
    arp_patterns=(".",),
    arp_steps=1,
    arp_centre=66,
    arp=Part(("clean_guitar",), 0.45, -8.0, -22),
    pad=Part(("organ",), 0.1, -13.0, -16),
    pad_calm=False,
    lead=Part(("clean_guitar", "organ"), 0.3, -3.0, -16),
    fill={"snare_tight": "....X.x.xx.xX.xx", "kick": "X..x..x.........", "tom_low": "..............x."},
    drums_db=-3.5,
    hall_s=0.9,
    pump=0.0,
    names=("funk", "funk soul", "soul groove", "seventies funk"),
    features=(
        "syncopated slap bass",
        "electric piano",
        "tight snare with ghost notes",
        "sixteenth-note hi-hats",
        "scratchy rhythm guitar",
    ),
)

BOSSA = Style(
    name="bossa",
    tempo_low=92,
    tempo_high=140,
    sevenths=1.0,
    swing=0.0,
    calm=(
        {"kick": "o.....ox......oo", "shaker": "x.o.x.o.x.o.x.o.", "rim": "x.....x.....x.......x.....x....."},
        {"kick": "o.....o.x.....o.", "shaker": "xoooxoooxoooxooo", "rim": "x.....x.....x.......x.....x....."},
    ),
    full=(
        {
            "kick": "x.....o.x.....o.",
            "shaker": "xoxoxoxoxoxoxoxo",
            "rim": "x.....x.....x.......x.....x.....",
            "conga_high": "..o...x...o...x.",
            "conga_low": "........x.......",
        },
        {
            "kick": "x.....o.x.....o.",
            "shaker": "x.o.x.o.x.o.x.o.",
            "rim": "....x.....x.....x.....x.....x...",
            "conga_high": "....x.......x...",
            "conga_low": "......o.......xx",
        },
    ),
    bass_lines=("0:6:R 6:2:5 8:6:5 14:2:R", "0:6:R 6:2:R 8:6:5 14:2:5"),
    bass=Part(("upright_bass",), 0.0, 0.0, -30),
    comp_patterns=("x...x.....x.....x.....x...x.....", "x.....x...x.....x...x.....x....."),
    comp_steps=4,
    comp_centre=60,
    comp=Part(("nylon_guitar",), 0.25, 0.0, -18),
    arp_patterns=("..0...1...2...1.", "0.....1.....2..."),
    arp_steps=4,
    arp_centre=66,
    arp=Part(("electric_piano",), -0.4, -9.0, -16),
    pad=Part(("strings",), -0.1, -13.0, -12),
    pad_calm=False,
    lead=Part(("flute", "electric_piano"), -0.15, -2.0, -11),
    fill={"rim": "x.....x.....x...", "conga_high": "..x.x.xx..x.x...", "conga_low": "............xxxx"},
    drums_db=-3.0,
    hall_s=1.3,
    pump=0.0,
    names=("bossa nova", "latin bossa", "brazilian lounge", "samba-tinged latin"),
    features=("nylon-string guitar", "upright bass", "shaker and rim clave", "congas", "soft flute"),
)

ROCK = Style(
    name="rock",
    tempo_low=92,
    tempo_high=150,
    sevenths=0.0,
    swing=0.0,
    calm=(
        {"kick": "X.......X.x.....", "snare": "....X.......X...", "hat": "x.o.x.o.x.o.x.o."},
        {"kick": "X.....x.X.......", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
    ),
    full=(
        {"kick": "X.....x.X.x.....", "snare": "....X.......X...", "ride": "x.x.x.x.x.x.x.x."},
        {"kick": "X.x...x.X.....x.", "snare": "....X.......X...", "open_hat": "x...x...x...x..."},
    ),
    bass_lines=(
        "0:2:R 2:2:R 4:2:R 6:2:R 8:2:R 10:2:R 12:2:R 14:2:a",
        "0:4:R 4:2:R 6:2:R 8:4:R 12:2:5 14:2:R",
    ),
    bass=Part(("pick_bass",), 0.0, -2.0, -40),
    comp_patterns=("X.x.x.x.X.x.x.x.", "X.....x.X.......", "X.......x.x.x.x."),
    comp_steps=2,
    comp_centre=45,
    comp=Part(("power_chord",), 0.0, -2.0, -22),
    arp_patterns=("0.1.2.1.3.1.2.1.", "0.2.1.2.0.2.1.3."),
    arp_steps=4,
    arp_centre=62,
    arp=Part(("clean_guitar",), -0.35, -8.0, -16),
    pad=Part(("organ",), 0.2, -13.0, -14),
    pad_calm=False,
    lead=Part(("clean_guitar", "synth_lead"), 0.2, -3.0, -12),
    fill={
        "snare": "....X...xxxx....",
        "tom_high": "............xx..",
        "tom_low": "..............xx",
        "kick": "X.......X.......",
    },
    drums_db=-5.0,
    hall_s=1.4,
    pump=0.0,
    names=("rock", "alternative rock", "guitar rock", "arena rock"),
    features=(
        "distorted power chords",
        "driving picked bass",
        "loud live drums",
        "crash cymbals",
        "overdriven guitars",
    ),
)

STYLES: dict[str, Style] = {style.name: style for style in (SYNTHPOP, BALLAD, FUNK, BOSSA, ROCK)}
