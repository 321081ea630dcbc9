"""Words and pairs that no training caption has, so that a judge can ask for it.

Two fixed lists, of other words for things and of pairs of a colour and a thing, and a rule for
pairs of things. Training drops every caption with one of these words, paints no thing in a colour
that it is paired with here, and puts no two things together that the rule keeps apart.
"""

import re
import zlib

SYNONYMS: dict[str, str] = {
    # animals and plants
    "kitten": "cat|cat face", "puppy": "dog|dog face", "hare": "rabbit|rabbit face",
    "hog": "pig|pig face|boar", "bovine": "cow|cow face|ox", "stallion": "horse|horse face",
    "serpent": "snake", "tortoise": "turtle", "alligator": "crocodile", "bumblebee": "honeybee",
    "ladybug": "lady beetle", "cockerel": "rooster|chicken", "mallard": "duck", "hawk": "eagle",
    "pigeon": "dove", "toad": "frog", "puffer fish": "blowfish", "grizzly": "bear",
    "pachyderm": "elephant", "hippo": "hippopotamus", "rhino": "rhinoceros",
    "tyrannosaur": "T-Rex", "brontosaurus": "sauropod", "parakeet": "parrot",
    "arachnid": "spider", "toadstool": "mushroom", "conch": "spiral shell",
    "sapling": "seedling", "fir": "evergreen tree", "killer whale": "whale|spouting whale",
    # food and drink
    "cup of coffee": "hot beverage", "aubergine": "eggplant", "maize": "ear of corn",
    "spud": "potato", "loaf": "bread", "cheeseburger": "hamburger", "frankfurter": "hot dog",
    "biscuit": "cookie", "muffin": "cupcake", "flapjacks": "pancakes", "prawn": "shrimp",
    "champagne": "bottle with popping cork", "pint of ale": "beer mug",
    "martini": "cocktail glass", "goblet": "wine glass", "mandarin orange": "tangerine",
    "drumstick": "poultry leg", "nectarine": "peach", "ice lolly": "lollipop",
    # places and what moves
    "automobile": "automobile|oncoming automobile", "cottage": "house|house with garden",
    "skyscraper": "office building", "fortress": "castle", "chapel": "church",
    "fire truck": "fire engine", "semi truck": "articulated lorry", "motorbike": "motorcycle",
    "two-wheeler": "bicycle", "yacht": "sailboat", "jetliner": "airplane|small airplane",
    "chopper": "helicopter", "spaceship": "rocket", "ufo": "flying saucer",
    "streetcar": "tram|tram car",
    "traffic signal": "vertical traffic light|horizontal traffic light",
    "wigwam": "tent", "sand timer": "hourglass not done", "wristwatch": "watch",
    "parasol": "umbrella|closed umbrella|umbrella on ground|umbrella with rain drops",
    "lightning bolt": "high voltage", "teardrop": "droplet", "blaze": "fire",
    "saturn": "ringed planet",
    # objects
    "sneaker": "running shoe", "stiletto": "high-heeled shoe", "trousers": "jeans",
    "spectacles": "glasses", "rucksack": "backpack", "mittens": "gloves", "gown": "dress",
    "tiara": "crown", "cellphone": "mobile phone", "notebook computer": "laptop",
    "parcel": "package", "hatchet": "axe", "spanner": "wrench", "hypodermic": "syringe",
    "sofa": "couch and lamp", "lavatory": "toilet", "pail": "bucket", "tombstone": "headstone",
    "casket": "coffin", "fiddle": "violin", "earphones": "headphone", "dice": "game die",
    "present": "wrapped gift", "jigsaw": "puzzle piece", "sleigh": "sled", "spyglass": "telescope",
    "loupe": "magnifying glass tilted left|magnifying glass tilted right",
}  # fmt: skip
"""Another word for a thing -> the names of the emoji that show it."""

COLOURED: tuple[tuple[str, str], ...] = (
    ("blue", "car"), ("purple", "car"), ("pink", "elephant"), ("green", "cat"), ("blue", "dog"),
    ("purple", "horse"), ("red", "frog"), ("yellow", "whale"), ("green", "pig"), ("orange", "fish"),
    ("purple", "banana"), ("blue", "strawberry"), ("green", "carrot"), ("pink", "lemon"),
    ("red", "turtle"), ("blue", "mushroom"), ("orange", "dolphin"), ("pink", "crocodile"),
    ("green", "rocket"), ("purple", "bus"), ("orange", "house"), ("blue", "tomato"),
    ("yellow", "dress"), ("purple", "key"), ("red", "guitar"), ("green", "bell"),
    ("pink", "star"), ("orange", "shield"), ("blue", "rose"), ("yellow", "shark"),
    ("purple", "tree"), ("pink", "umbrella"), ("green", "crab"), ("blue", "lion"),
    ("orange", "snake"), ("red", "bicycle"), ("yellow", "backpack"), ("purple", "duck"),
    ("red", "whale"), ("green", "octopus"), ("blue", "violin"), ("orange", "butterfly"),
    ("red", "laptop"), ("yellow", "helicopter"), ("green", "crown"), ("pink", "truck"),
    ("purple", "cactus"), ("blue", "fox"), ("red", "spoon"), ("green", "hat"),
    ("green", "heart"), ("purple", "heart"), ("orange", "book"), ("orange", "circle"),
    ("blue", "circle"), ("brown", "square"),
)  # fmt: skip
"""Colours and things (a word of the thing's name) that no training picture puts together."""

_WORDS = re.compile(r"\b(?:" + "|".join(re.escape(word) for word in SYNONYMS) + r")s?\b")


def has_synonym(caption: str) -> bool:
    """Tell whether a held-out word stands in a caption, whatever its hyphens and capitals."""
    text = caption.lower()
    return bool(_WORDS.search(text) or _WORDS.search(text.replace("-", " ")))


def is_held_out(colour: str, name: str) -> bool:
    """Tell whether a thing of this name must not be painted in this colour."""
    words = set(name.lower().replace("-", " ").split())
    return any(colour == one and thing in words for one, thing in COLOURED)


def is_held_out_pair(first: str, second: str) -> bool:
    """Tell whether two emoji never share a picture: one of ten pairs, whichever comes first."""
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % 10 == 0
