"""The classes of the data sets that released checkpoints were trained on: names, things and stuff, colours.

In the tables, a class is its id in the data set's own files, thing or stuff, its colour (RGB, hexadecimal) and name;
after a bar its name in the data set's instance task, where that differs. Classes are in the order of labels, separated
by semicolons. The facts are those of the original's data set registration. ADE20K's "window " is written without its
trailing space.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


TASKS = ("panoptic", "instance", "semantic")
VIDEO_TASKS = ("instance", "panoptic")


class Label(NamedTuple):
    """One class of a data set."""

    name: str
    is_thing: bool | None  # countable; None in a semantic task, which does not tell things from stuff
    color: tuple[int, int, int] | None  # RGB, 0 to 255
    dataset_id: int  # in the data set's own files


class LabelSet(NamedTuple):
    """The classes of one task of a data set; a class's index is the label that a model predicts."""

    name: str
    labels: tuple[Label, ...]
    ignore_value: int  # the value of pixels without a class in label maps

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> name."""
        return {index: label.name for index, label in enumerate(self.labels)}

    @property
    def stuff_ids(self) -> list[int] | None:
        """Stuff labels, an empty list for an instance task; None where the set does not tell them from things."""
        if any(label.is_thing is None for label in self.labels):
            return None
        return [index for index, label in enumerate(self.labels) if not label.is_thing]

    @property
    def colors(self) -> list[list[int]] | None:
        """One RGB colour, 0 to 255, for each label; None where one has none."""
        colors = [list(label.color) for label in self.labels if label.color is not None]
        return colors if len(colors) == len(self.labels) else None

    @property
    def dataset(self) -> str:
        """The data set's name without the task."""
        return self.name.partition("-")[0]

    @property
    def task(self) -> str:
        """One of `TASKS`; the video sets segment instances."""
        return self.name.partition("-")[2] or "instance"


_COCO = """\
1 thing dc143c person; 2 thing 770b20 bicycle; 3 thing 00008e car; 4 thing 0000e6 motorcycle; 5 thing 6a00e4 airplane;
6 thing 003c64 bus; 7 thing 005064 train; 8 thing 000046 truck; 9 thing 0000c0 boat; 10 thing faaa1e traffic light;
11 thing 64aa1e fire hydrant; 13 thing dcdc00 stop sign; 14 thing af74af parking meter; 15 thing fa001e bench;
16 thing a52a2a bird; 17 thing ff4dff cat; 18 thing 00e2fc dog; 19 thing b6b6ff horse; 20 thing 005200 sheep;
21 thing 78a69d cow; 22 thing 6e4c00 elephant; 23 thing ae39ff bear; 24 thing c76400 zebra; 25 thing 480076 giraffe;
27 thing ffb3f0 backpack; 28 thing 007d5c umbrella; 31 thing d10097 handbag; 32 thing bcd0b6 tie;
33 thing 00dcb0 suitcase; 34 thing ff63a4 frisbee; 35 thing 5c0049 skis; 36 thing 8581ff snowboard;
37 thing 4eb4ff sports ball; 38 thing 00e400 kite; 39 thing aefff3 baseball bat; 40 thing 2d59ff baseball glove;
41 thing 868667 skateboard; 42 thing 9194ae surfboard; 43 thing ffd0ba tennis racket; 44 thing c5e2ff bottle;
46 thing ab8601 wine glass; 47 thing 6d3f36 cup; 48 thing cf8aff fork; 49 thing 97005f knife; 50 thing 09503d spoon;
51 thing 546933 bowl; 52 thing 4a4169 banana; 53 thing a6c466 apple; 54 thing d0c3d2 sandwich; 55 thing ff6d41 orange;
56 thing 008f95 broccoli; 57 thing b300c2 carrot; 58 thing d1636a hot dog; 59 thing 057900 pizza; 60 thing e3ffcd donut;
61 thing 93bad0 cake; 62 thing 994501 chair; 63 thing 035fa1 couch; 64 thing a3ff00 potted plant; 65 thing 7700aa bed;
67 thing 00b6c7 dining table; 70 thing 00a578 toilet; 72 thing b78258 tv; 73 thing 5f2000 laptop; 74 thing 827287 mouse;
75 thing 6e8185 remote; 76 thing a64a76 keyboard; 77 thing db8eb9 cell phone; 78 thing 4fd272 microwave;
79 thing b25a3e oven; 80 thing 41460f toaster; 81 thing 7fa773 sink; 82 thing 3b696a refrigerator; 84 thing 8e6c2d book;
85 thing c4ac00 clock; 86 thing 5f3650 vase; 87 thing 804cff scissors; 88 thing c93901 teddy bear;
89 thing f6007a hair drier; 90 thing bfa2d0 toothbrush; 92 stuff ffff80 banner; 93 stuff 93d3cb blanket;
95 stuff 966464 bridge; 100 stuff a8abac cardboard; 107 stuff 9270c6 counter; 109 stuff d2aa64 curtain;
112 stuff 5c8859 door-stuff; 118 stuff da58b8 floor-wood; 119 stuff f18100 flower; 122 stuff d911ff fruit;
125 stuff 7c4ab5 gravel; 128 stuff 464646 house; 130 stuff ffe4ff light; 133 stuff 9ad000 mirror-stuff;
138 stuff c1005c net; 141 stuff 4c5b71 pillow; 144 stuff ffb4c3 platform; 145 stuff 6a9ab0 playingfield;
147 stuff e6968c railroad; 148 stuff 3c8fff river; 149 stuff 804080 road; 151 stuff 5c5237 roof; 154 stuff fed47c sand;
155 stuff 494dae sea; 156 stuff ffa062 shelf; 159 stuff ffffff snow; 161 stuff 68546d stairs; 166 stuff a9a483 tent;
168 stuff e1c7ff towel; 171 stuff 89364a wall-brick; 175 stuff 879edf wall-stone; 176 stuff 07f6e7 wall-tile;
177 stuff 6bffc8 wall-wood; 178 stuff 3a2995 water-other; 180 stuff b7798e window-blind; 181 stuff ff4961 window-other;
184 stuff 6b8e23 tree-merged; 185 stuff be9999 fence-merged; 186 stuff 928b8d ceiling-merged;
187 stuff 4682b4 sky-other-merged; 188 stuff 86c79c cabinet-merged; 189 stuff d1e28c table-merged;
190 stuff 60246c floor-other-merged; 191 stuff 606060 pavement-merged; 192 stuff 40aa40 mountain-merged;
193 stuff 98fb98 grass-merged; 194 stuff d0e5e4 dirt-merged; 195 stuff cebaab paper-merged;
196 stuff 98a140 food-other-merged; 197 stuff 747000 building-other-merged; 198 stuff 00728f rock-merged;
199 stuff 66669c wall-other-merged; 200 stuff fa8dff rug-merged
"""

_ADE20K = """\
0 stuff 787878 wall; 1 stuff b47878 building; 2 stuff 06e6e6 sky; 3 stuff 503232 floor; 4 stuff 04c803 tree;
5 stuff 787850 ceiling; 6 stuff 8c8c8c road, route; 7 thing cc05ff bed; 8 thing e6e6e6 window | windowpane;
9 stuff 04fa07 grass; 10 thing e005ff cabinet; 11 stuff ebff07 sidewalk, pavement; 12 thing 96053d person;
13 stuff 787846 earth, ground; 14 thing 08ff33 door; 15 thing ff0652 table; 16 stuff 8fff8c mountain, mount;
17 stuff ccff04 plant; 18 thing ff3307 curtain; 19 thing cc4603 chair; 20 thing 0066c8 car; 21 stuff 3de6fa water;
22 thing ff0633 painting, picture | painting; 23 thing 0b66ff sofa; 24 thing ff0747 shelf; 25 stuff ff09e0 house;
26 stuff 0907e6 sea; 27 thing dcdcdc mirror; 28 stuff ff095c rug; 29 stuff 7009ff field; 30 thing 08ffd6 armchair;
31 thing 07ffe0 seat; 32 thing ffb806 fence; 33 thing 0aff47 desk; 34 stuff ff290a rock, stone;
35 thing 07ffff wardrobe, closet, press | wardrobe; 36 thing e0ff08 lamp; 37 thing 6608ff tub | bathtub;
38 thing ff3d06 rail | railing; 39 thing ffc207 cushion; 40 stuff ff7a08 base, pedestal, stand; 41 thing 00ff14 box;
42 thing ff0829 column, pillar | column; 43 thing ff0599 signboard, sign | signboard;
44 thing 0633ff chest of drawers, chest, bureau, dresser | chest of drawers; 45 thing eb0cff counter;
46 stuff a09614 sand; 47 thing 00a3ff sink; 48 stuff 8c8c8c skyscraper; 49 thing fa0a0f fireplace;
50 thing 14ff00 refrigerator, icebox | refrigerator; 51 stuff 1fff00 grandstand, covered stand; 52 stuff ff1f00 path;
53 thing ffe000 stairs; 54 stuff 99ff00 runway; 55 thing 0000ff case, display case, showcase, vitrine | case;
56 thing ff4700 pool table, billiard table, snooker table | pool table; 57 thing 00ebff pillow;
58 thing 00adff screen door, screen | screen door; 59 stuff 1f00ff stairway, staircase; 60 stuff 0bc8c8 river;
61 stuff ff5200 bridge, span; 62 thing 00fff5 bookcase; 63 stuff 003dff blind, screen; 64 thing 00ff70 coffee table;
65 thing 00ff85 toilet, can, commode, crapper, pot, potty, stool, throne | toilet; 66 thing ff0000 flower;
67 thing ffa300 book; 68 stuff ff6600 hill; 69 thing c2ff00 bench; 70 thing 008fff countertop; 71 thing 33ff00 stove;
72 thing 0052ff palm, palm tree | palm; 73 thing 00ff29 kitchen island; 74 thing 00ffad computer;
75 thing 0a00ff swivel chair; 76 thing adff00 boat; 77 stuff 00ff99 bar; 78 thing ff5c00 arcade machine;
79 stuff ff00ff hovel, hut, hutch, shack, shanty; 80 thing ff00f5 bus; 81 thing ff0066 towel; 82 thing ffad00 light;
83 thing ff0014 truck; 84 stuff ffb8b8 tower; 85 thing 001fff chandelier;
86 thing 00ff3d awning, sunshade, sunblind | awning; 87 thing 0047ff street lamp | streetlight; 88 thing ff00cc booth;
89 thing 00ffc2 tv | television receiver; 90 thing 00ff52 plane | airplane; 91 stuff 000aff dirt track;
92 thing 0070ff clothes | apparel; 93 thing 3300ff pole; 94 stuff 00c2ff land, ground, soil;
95 thing 007aff bannister, banister, balustrade, balusters, handrail | bannister;
96 stuff 00ffa3 escalator, moving staircase, moving stairway;
97 thing ff9900 ottoman, pouf, pouffe, puff, hassock | ottoman; 98 thing 00ff0a bottle;
99 stuff ff7000 buffet, counter, sideboard; 100 stuff 8fff00 poster, posting, placard, notice, bill, card;
101 stuff 5200ff stage; 102 thing a3ff00 van; 103 thing ffeb00 ship; 104 thing 08b8aa fountain;
105 stuff 8500ff conveyer belt, conveyor belt, conveyer, conveyor, transporter; 106 stuff 00ff5c canopy;
107 thing b800ff washer, automatic washer, washing machine | washer; 108 thing ff001f plaything, toy | plaything;
109 stuff 00b8ff pool; 110 thing 00d6ff stool; 111 thing ff0070 barrel, cask | barrel;
112 thing 5cff00 basket, handbasket | basket; 113 stuff 00e0ff falls; 114 stuff 70e0ff tent; 115 thing 46b8a0 bag;
116 thing a300ff minibike, motorbike | minibike; 117 stuff 9900ff cradle; 118 thing 47ff00 oven; 119 thing ff00a3 ball;
120 thing ffcc00 food, solid food | food; 121 thing ff008f step, stair | step; 122 stuff 00ffeb tank, storage tank;
123 thing 85ff00 trade name; 124 thing ff00eb microwave; 125 thing f500ff pot; 126 thing ff007a animal;
127 thing fff500 bicycle; 128 stuff 0abed4 lake; 129 thing d6ff00 dishwasher; 130 thing 00ccff screen;
131 stuff 1400ff blanket, cover; 132 thing ffff00 sculpture; 133 thing 0099ff hood, exhaust hood | hood;
134 thing 0029ff sconce; 135 thing 00ffcc vase; 136 thing 2900ff traffic light; 137 thing 29ff00 tray;
138 thing ad00ff trash can | ashcan; 139 thing 00f5ff fan; 140 stuff 4700ff pier; 141 stuff 7a00ff crt screen;
142 thing 00ffb8 plate; 143 thing 005cff monitor; 144 thing b8ff00 bulletin board; 145 stuff 0085ff shower;
146 thing ffd600 radiator; 147 thing 19c2c2 glass, drinking glass | glass; 148 thing 66ff00 clock; 149 thing 5c00ff flag
"""

_CITYSCAPES = """\
7 stuff 804080 road; 8 stuff f423e8 sidewalk; 11 stuff 464646 building; 12 stuff 66669c wall; 13 stuff be9999 fence;
17 stuff 999999 pole; 19 stuff faaa1e traffic light; 20 stuff dcdc00 traffic sign; 21 stuff 6b8e23 vegetation;
22 stuff 98fb98 terrain; 23 stuff 4682b4 sky; 24 thing dc143c person; 25 thing ff0000 rider; 26 thing 00008e car;
27 thing 000046 truck; 28 thing 003c64 bus; 31 thing 005064 train; 32 thing 0000e6 motorcycle; 33 thing 770b20 bicycle
"""

_MAPILLARY = """\
1 thing a52a2a Bird; 2 thing 00c000 Ground Animal; 3 stuff c4c4c4 Curb; 4 stuff be9999 Fence; 5 stuff b4a5b4 Guard Rail;
6 stuff 5a7896 Barrier; 7 stuff 66669c Wall; 8 stuff 8040ff Bike Lane; 9 thing 8c8cc8 Crosswalk - Plain;
10 stuff aaaaaa Curb Cut; 11 stuff faaaa0 Parking; 12 stuff 606060 Pedestrian Area; 13 stuff e6968c Rail Track;
14 stuff 804080 Road; 15 stuff 6e6e6e Service Lane; 16 stuff f423e8 Sidewalk; 17 stuff 966464 Bridge;
18 stuff 464646 Building; 19 stuff 96785a Tunnel; 20 thing dc143c Person; 21 thing ff0000 Bicyclist;
22 thing ff0064 Motorcyclist; 23 thing ff00c8 Other Rider; 24 thing c88080 Lane Marking - Crosswalk;
25 stuff ffffff Lane Marking - General; 26 stuff 40aa40 Mountain; 27 stuff e6a032 Sand; 28 stuff 4682b4 Sky;
29 stuff beffff Snow; 30 stuff 98fb98 Terrain; 31 stuff 6b8e23 Vegetation; 32 stuff 00aa1e Water;
33 thing ffff80 Banner; 34 thing fa001e Bench; 35 thing 648cb4 Bike Rack; 36 thing dcdcdc Billboard;
37 thing dc8080 Catch Basin; 38 thing de2828 CCTV Camera; 39 thing 64aa1e Fire Hydrant; 40 thing 282828 Junction Box;
41 thing 212121 Mailbox; 42 thing 6480a0 Manhole; 43 thing 8e0000 Phone Booth; 44 stuff 466496 Pothole;
45 thing d2aa64 Street Light; 46 thing 999999 Pole; 47 thing 808080 Traffic Sign Frame; 48 thing 000050 Utility Pole;
49 thing faaa1e Traffic Light; 50 thing c0c0c0 Traffic Sign (Back); 51 thing dcdc00 Traffic Sign (Front);
52 thing 8c8c14 Trash Can; 53 thing 770b20 Bicycle; 54 thing 9600ff Boat; 55 thing 003c64 Bus; 56 thing 00008e Car;
57 thing 00005a Caravan; 58 thing 0000e6 Motorcycle; 59 stuff 005064 On Rails; 60 thing 804040 Other Vehicle;
61 thing 00006e Trailer; 62 thing 000046 Truck; 63 thing 0000c0 Wheeled Slow; 64 stuff 202020 Car Mount;
65 stuff 780a0a Ego Vehicle
"""

_YTVIS2019 = """\
1 thing dc143c person; 2 thing 005200 giant_panda; 3 thing 770b20 lizard; 4 thing a52a2a parrot;
5 thing 868667 skateboard; 6 thing 00008e sedan; 7 thing ff6d41 ape; 8 thing 00e2fc dog; 9 thing 057900 snake;
10 thing 003c64 monkey; 11 thing faaa1e hand; 12 thing 64aa1e rabbit; 13 thing b300c2 duck; 14 thing ff4dff cat;
15 thing 78a69d cow; 16 thing 494dae fish; 17 thing 005064 train; 18 thing b6b6ff horse; 19 thing 008f95 turtle;
20 thing ae39ff bear; 21 thing 0000e6 motorbike; 22 thing 480076 giraffe; 23 thing ffb3f0 leopard; 24 thing 007d5c fox;
25 thing d10097 deer; 26 thing bcd0b6 owl; 27 thing 9194ae surfboard; 28 thing 6a00e4 airplane; 29 thing 000046 truck;
30 thing c76400 zebra; 31 thing a6c466 tiger; 32 thing 6e4c00 elephant; 33 thing 8581ff snowboard; 34 thing 0000c0 boat;
35 thing b78258 shark; 36 thing 827287 mouse; 37 thing 6b8e23 frog; 38 thing 00e400 eagle; 39 thing aefff3 earless_seal;
40 thing ffd0ba tennis_racket
"""

_YTVIS2021 = """\
1 thing 6a00e4 airplane; 2 thing ae39ff bear; 3 thing ff6d41 bird; 4 thing 0000c0 boat; 5 thing 00008e car;
6 thing ff4dff cat; 7 thing 78a69d cow; 8 thing d10097 deer; 9 thing 00e2fc dog; 10 thing b300c2 duck;
11 thing aefff3 earless_seal; 12 thing 6e4c00 elephant; 13 thing 494dae fish; 14 thing faaa1e flying_disc;
15 thing 007d5c fox; 16 thing 6b8e23 frog; 17 thing 005200 giant_panda; 18 thing 480076 giraffe; 19 thing b6b6ff horse;
20 thing ffb3f0 leopard; 21 thing 770b20 lizard; 22 thing 003c64 monkey; 23 thing 0000e6 motorbike;
24 thing 827287 mouse; 25 thing a52a2a parrot; 26 thing dc143c person; 27 thing 64aa1e rabbit; 28 thing b78258 shark;
29 thing 868667 skateboard; 30 thing 057900 snake; 31 thing 8581ff snowboard; 32 thing bcd0b6 squirrel;
33 thing 9194ae surfboard; 34 thing ffd0ba tennis_racket; 35 thing a6c466 tiger; 36 thing 005064 train;
37 thing 000046 truck; 38 thing 008f95 turtle; 39 thing 00e400 whale; 40 thing c76400 zebra
"""


def _labels(table: str, task: str = "panoptic") -> tuple[Label, ...]:
    """Read a table: for "instance" the things alone, for "semantic" all classes, with `is_thing` None."""
    labels = []
    for entry in table.replace("\n", " ").split("; "):
        dataset_id, kind, color, names = entry.strip().split(" ", 3)
        name, _, instance_name = names.partition(" | ")
        is_thing = kind == "thing"
        if task == "instance":
            if not is_thing:
                continue
            name = instance_name or name
        red, green, blue = bytes.fromhex(color)
        labels.append(Label(name, None if task == "semantic" else is_thing, (red, green, blue), int(dataset_id)))
    return tuple(labels)


LABEL_SETS: dict[str, LabelSet] = {
    name: LabelSet(name, _labels(table, task), ignore_value)
    for name, table, task, ignore_value in (
        ("coco-panoptic", _COCO, "panoptic", 255),
        ("coco-instance", _COCO, "instance", 255),
        ("ade20k-panoptic", _ADE20K, "panoptic", 255),
        ("ade20k-semantic", _ADE20K, "semantic", 255),
        ("ade20k-instance", _ADE20K, "instance", 255),
        ("cityscapes-panoptic", _CITYSCAPES, "panoptic", 255),
        ("cityscapes-semantic", _CITYSCAPES, "semantic", 255),
        ("cityscapes-instance", _CITYSCAPES, "instance", 255),
        ("mapillary-panoptic", _MAPILLARY, "panoptic", 65),
        ("mapillary-semantic", _MAPILLARY, "semantic", 65),
        ("ytvis2019", _YTVIS2019, "instance", 255),
        ("ytvis2021", _YTVIS2021, "instance", 255),
    )
}

# The data sets as the names of checkpoints spell them, in lower case and with hyphens.
_DATASET_PATTERNS = {
    "coco": r"coco(2017)?",
    "ade20k": r"ade(20k)?",
    "cityscapes": r"cityscapes?",
    "mapillary": r"mapillary",
    "ytvis2019": r"(ytvis|youtube-?vis)-?2019",
    "ytvis2021": r"(ytvis|youtube-?vis)-?2021",
}

# Spellings differ between copies of these lists; with fewer equal labels, it is another list.
_MIN_SHARE_OF_EQUAL_LABELS = 0.9


def label_set(name: str) -> LabelSet:
    """Return the label set of this name.

    Raises:
        ValueError: there is none; the message names the known ones.
    """
    if name not in LABEL_SETS:
        raise ValueError(f"there is no label set {name!r}; the known ones are {', '.join(LABEL_SETS)}")
    return LABEL_SETS[name]


def find_label_set(id2label: Mapping[int, str], name: str = "") -> LabelSet | None:
    """Return the known label set that a model's labels are, or None.

    Args:
        id2label: the model's labels, from 0. Case, punctuation and the choice of synonym do not count, and one label in
            ten may be spelled differently. Placeholders (`LABEL_0`, `LABEL_1`, …) count by their number alone.
        name: of the checkpoint, an id or a folder, such as "facebook/mask2former-swin-large-cityscapes-semantic". It
            decides between tasks with equal labels (else the panoptic one), and names the data set of placeholders.
    """
    candidates = matching_label_sets(id2label, name)
    task = task_in_name(name)
    return next((known for known in candidates if known.task == task), next(iter(candidates), None))


def matching_label_sets(id2label: Mapping[int, str], name: str = "") -> list[LabelSet]:
    """Return every set that `find_label_set` chooses from: the tasks of one data set that have these labels."""
    same_length = [known for known in LABEL_SETS.values() if len(known.labels) == len(id2label)]
    if are_placeholders(id2label):
        return [known for known in same_length if known.dataset == dataset_in_name(name)]
    return [known for known in same_length if _has_labels(known, id2label)]


def are_placeholders(id2label: Mapping[int, str]) -> bool:
    """Return whether the labels are what `transformers` fills in by default: `LABEL_0`, `LABEL_1`, …"""
    return all(label == f"LABEL_{index}" for index, label in id2label.items())


def task_in_name(name: str) -> str | None:
    """Return the last task named in a checkpoint's name, or None."""
    words = own_name(name).split("-")
    return next((word for word in reversed(words) if word in TASKS), None)


def dataset_in_name(name: str) -> str | None:
    """Return the known data set named in a checkpoint's name, such as "ade20k" or "ytvis2019", or None."""
    words = own_name(name)
    for dataset, pattern in _DATASET_PATTERNS.items():
        if re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", words):
            return dataset
    return None


def own_name(name: str) -> str:
    """Return a checkpoint's name without owner or parent folders, in lower case, its words joined by hyphens."""
    parts = re.split(r"[/\\]", name.lower().rstrip("/\\"))
    # The Hub's cache keeps "owner/name" as models--owner--name/snapshots/<commit>.
    own = next((part for part in parts if part.startswith("models--")), parts[-1]).split("--")[-1]
    return re.sub(r"[^a-z0-9]+", "-", own)


def _has_labels(known: LabelSet, id2label: Mapping[int, str]) -> bool:
    """Return whether the labels are those of `known`, in the spelling of any task of the data set."""
    relatives = [label for other in LABEL_SETS.values() if other.dataset == known.dataset for label in other.labels]
    num_equal = 0
    for index, label in enumerate(known.labels):
        names = [relative.name for relative in relatives if relative.dataset_id == label.dataset_id]
        num_equal += bool(_spellings(id2label.get(index, "")) & _spellings(",".join(names)))
    return num_equal >= _MIN_SHARE_OF_EQUAL_LABELS * len(known.labels)


def _spellings(names: str) -> set[str]:
    """Split synonyms at commas, and keep the letters and digits of each."""
    return {re.sub(r"[^a-z0-9]", "", synonym.lower()) for synonym in names.split(",")} - {""}
