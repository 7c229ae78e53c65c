"""
Makes the questions in `examples/data/common_knowledge/`: facts and grammar that a small language model may know.

Every right answer is in this file. Wrong ones are right answers to other questions of the same kind, or word forms that
English doesn't have. It takes a second:

    python -m examples.data.make_common_knowledge
"""

import argparse
import json
import random
from pathlib import Path

OUTPUT = Path(__file__).parent / "common_knowledge" / "items.jsonl"

# The question and the right answer. Wrong answers are three others from the same list.
FACTS = {
    "capitals": (
        "The capital of {} is",
        "France Paris|Italy Rome|Spain Madrid|Germany Berlin|Portugal Lisbon|Austria Vienna|Greece Athens"
        "|Poland Warsaw|Hungary Budapest|Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen"
        "|Ireland Dublin|Russia Moscow|Ukraine Kyiv|Romania Bucharest|Bulgaria Sofia|Serbia Belgrade"
        "|Croatia Zagreb|Belgium Brussels|Iceland Reykjavik|Turkey Ankara|Egypt Cairo|Kenya Nairobi"
        "|Morocco Rabat|Ethiopia Addis_Ababa|Ghana Accra|Nigeria Abuja|Senegal Dakar|Tunisia Tunis"
        "|Algeria Algiers|Japan Tokyo|China Beijing|India New_Delhi|Thailand Bangkok|Vietnam Hanoi|Iran Tehran"
        "|Iraq Baghdad|Nepal Kathmandu|Bangladesh Dhaka|Pakistan Islamabad|Mongolia Ulaanbaatar"
        "|South_Korea Seoul|the_Philippines Manila|Cuba Havana|Canada Ottawa|Peru Lima|Chile Santiago"
        "|Argentina Buenos_Aires|Colombia Bogotá|Venezuela Caracas|Ecuador Quito|Uruguay Montevideo"
        "|Brazil Brasília|Australia Canberra|New_Zealand Wellington|Lebanon Beirut|Syria Damascus|Jordan Amman",
    ),
    "symbols": (
        "The chemical symbol of {} is",
        "hydrogen H|helium He|carbon C|nitrogen N|oxygen O|sodium Na|magnesium Mg|aluminium Al|silicon Si"
        "|phosphorus P|sulfur S|chlorine Cl|potassium K|calcium Ca|iron Fe|copper Cu|zinc Zn|silver Ag|tin Sn"
        "|iodine I|gold Au|mercury Hg|lead Pb|uranium U",
    ),
    "opposites": (
        "The opposite of '{}' is",
        "hot cold|big small|fast slow|up down|light dark|happy sad|rich poor|open closed|early late|full empty"
        "|wet dry|strong weak|young old|loud quiet|hard soft|clean dirty|near far|day night|left right|win lose"
        "|push pull|cheap expensive|thick thin|love hate|first last|north south|remember forget|always never"
        "|increase decrease|war peace",
    ),
    "young animals": (
        "A young {} is called a",
        "dog puppy|cat kitten|cow calf|horse foal|sheep lamb|goose gosling|duck duckling|bear cub|pig piglet"
        "|frog tadpole|swan cygnet",
    ),
    "days and months": (
        "The one that comes right after {} is",
        "Monday Tuesday|Tuesday Wednesday|Wednesday Thursday|Thursday Friday|Friday Saturday|Saturday Sunday"
        "|Sunday Monday|January February|February March|March April|April May|May June|June July|July August"
        "|August September|September October|October November|November December|December January",
    ),
    "work": (
        "A person who {} is called a",
        "bakes_bread baker|flies_planes pilot|grows_crops farmer|teaches_children teacher|writes_poems poet"
        "|cuts_hair barber|paints_pictures painter|repairs_cars mechanic|catches_fish fisherman"
        "|treats_teeth dentist|sells_meat butcher|plays_the_piano pianist|sells_flowers florist"
        "|makes_clothes tailor|puts_out_fires firefighter|takes_photographs photographer",
    ),
}

# Singular, plural, and two wrong forms
PLURALS = """
child children childs childrens|mouse mice mouses mices|foot feet foots feets|tooth teeth tooths teeths
man men mans mens|woman women womans womens|goose geese gooses geeses|leaf leaves leafs leafes
knife knives knifes knivs|wolf wolves wolfs wolfes|city cities citys cityes|baby babies babys babyes
box boxes boxs boxies|church churches churchs churchies|potato potatoes potatos potatoies|bus buses buss busies
half halves halfs halfes|wife wives wifes wivs|thief thieves thiefs thiefes|shelf shelves shelfs shelfes
story stories storys storyes|brush brushes brushs brushies|life lives lifes livs
"""

# Present, past, and two wrong forms
PASTS = """
go went goed gone|eat ate eated eaten|see saw seed seen|take took taked taken|write wrote writed written
sing sang singed sung|swim swam swimmed swum|drive drove drived driven|give gave gived given
break broke breaked broken|fly flew flied flown|know knew knowed known|begin began beginned begun
speak spoke speaked spoken|ride rode rided ridden|fall fell falled fallen|draw drew drawed drawn
grow grew growed grown|throw threw throwed thrown|drink drank drinked drunk|choose chose choosed chosen
forget forgot forgetted forgotten|wake woke waked woken|hide hid hided hidden
"""

# A subject of two nouns, of which the first one counts, the verb form that agrees with it, and one that doesn't
SUBJECTS = """
The keys to the cabinet are is|The key to the cabinets is are|The boys near the car were was
The boy near the cars was were|The picture of the flowers is are|The pictures of the flower are is
The teacher of the girls has have|The teachers of the girl have has|The author of the books was were
The authors of the book were was|The road between the villages is are|The roads to the village are is
The price of the apples has have|The prices of the apple have has|The dog behind the houses was were
The dogs behind the house were was|The label on the bottles is are|The labels on the bottle are is
The friend of the doctors has have|The friends of the doctor have has|The window of the rooms was were
The windows of the room were was|The farmer with the horses is are|The farmers with the horse are is
The box of pencils has have|The boxes of paper have has|The bridge over the rivers was were
The bridges over the river were was|The letter from the lawyers is are|The letters from the lawyer are is
The manager of the shops has have|The managers of the shop have has
"""


def entries(text: str) -> list[list[str]]:
    """Returns the words of each entry in a list. An underscore is a space within a word."""
    parts = [part for line in text.strip().splitlines() for part in line.split("|") if part]
    return [[word.replace("_", " ") for word in part.split()] for part in parts]


def items(seed: int) -> list[dict]:
    """Returns all questions, each with its right answer at a random place."""
    rng = random.Random(seed)
    questions = []
    for kind, (template, text) in FACTS.items():
        pairs = entries(text)
        for asked, right in pairs:
            # A wrong answer to a day is a day, to a month a month, and never the one in the question.
            group = [x for x in pairs if kind != "days and months" or x[0].endswith("day") == asked.endswith("day")]
            others = [other for _, other in group if other not in (right, asked)]
            questions.append((kind, template.format(asked), right, rng.sample(others, 3)))
    for one, right, *wrong in entries(PLURALS):
        questions.append(("plurals", f"One {one}, two", right, [*wrong, one]))
    for today, right, *wrong in entries(PASTS):
        questions.append(("past tense", f"They often {today}. Yesterday they", right, [*wrong, f"{today}s"]))
    for *subject, right, wrong in entries(SUBJECTS):
        questions.append(("agreement", " ".join(subject), right, [wrong]))
    rows = []
    for kind, question, right, wrong in questions:
        choices = [right, *wrong]
        rng.shuffle(choices)
        rows.append({"kind": kind, "question": question, "choices": choices, "answer": choices.index(right)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="for wrong answers and the order of answers")
    args = parser.parse_args()
    rows = items(args.seed)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} questions are in {OUTPUT}.")


if __name__ == "__main__":
    main()
