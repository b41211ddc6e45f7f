"""Text-to-SQL prompts of our own, the example domain of docs/finetune.md: `python -m benchmarks.sql_prompts --out FILE`.

Knows: a few invented schemas and what people ask of tables. Refuses to know: models, answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer


@dataclass(frozen=True)
class Schema:
    """Two tables; `parent`.id is `child`.`key`. Columns by what can be done with them: words, numbers, dates; `values`
    are some that the child's first word column has."""

    about: str
    parent: str
    parent_words: tuple[str, ...]
    child: str
    key: str
    words: tuple[str, ...]
    numbers: tuple[str, ...]
    date: str
    values: tuple[str, ...]

    def ddl(self) -> str:
        parent = ["id INTEGER PRIMARY KEY", *(f"{name} TEXT" for name in self.parent_words)]
        child = ["id INTEGER PRIMARY KEY", f"{self.key} INTEGER REFERENCES {self.parent}(id)"]
        child += [f"{name} TEXT" for name in self.words] + [f"{name} REAL" for name in self.numbers]
        body = lambda columns: ",\n".join(f"  {column}" for column in columns)
        return (
            f"CREATE TABLE {self.parent} (\n{body(parent)}\n);\n"
            f"CREATE TABLE {self.child} (\n{body([*child, f'{self.date} DATE'])}\n);"
        )


SCHEMAS = (
    Schema("a web shop", "customers", ("name", "city"), "orders", "customer_id", ("status", "channel"),
           ("total", "discount"), "ordered_on", ("open", "paid", "shipped", "returned")),
    Schema("a lending library", "members", ("name", "district"), "loans", "member_id", ("title", "genre"),
           ("days_late", "fine"), "borrowed_on", ("Dune", "Emma", "Middlemarch")),
    Schema("a clinic", "doctors", ("name", "department"), "visits", "doctor_id", ("reason", "patient"),
           ("minutes", "fee"), "visited_on", ("check-up", "vaccination", "fracture")),
    Schema("a bicycle hire", "stations", ("name", "quarter"), "trips", "station_id", ("rider_type", "bike_model"),
           ("kilometres", "price"), "started_on", ("member", "guest", "student")),
    Schema("a school", "teachers", ("name", "subject"), "grades", "teacher_id", ("pupil", "class_name"),
           ("points", "weight"), "given_on", ("Ada", "Noor", "Tomas")),
    Schema("a power grid", "plants", ("name", "fuel"), "readings", "plant_id", ("sensor", "state"),
           ("megawatts", "temperature"), "taken_on", ("intake", "turbine", "stack")),
    Schema("a bakery chain", "shops", ("name", "town"), "sales", "shop_id", ("product", "payment"),
           ("quantity", "amount"), "sold_on", ("rye bread", "croissant", "plum cake")),
    Schema("a help desk", "agents", ("name", "team"), "tickets", "agent_id", ("priority", "category"),
           ("hours_open", "replies"), "opened_on", ("low", "normal", "urgent")),
    Schema("an airline", "aircraft", ("registration", "model"), "flights", "aircraft_id", ("origin", "destination"),
           ("passengers", "delay_minutes"), "departed_on", ("Lisbon", "Oslo", "Vienna")),
    Schema("a music service", "artists", ("name", "country"), "plays", "artist_id", ("track", "device"),
           ("seconds", "rating"), "played_on", ("Harbour", "Small Hours", "Glass")),
    Schema("a farm cooperative", "farms", ("name", "region"), "harvests", "farm_id", ("crop", "quality"),
           ("tonnes", "price_per_tonne"), "harvested_on", ("wheat", "barley", "rapeseed")),
    Schema("a property agency", "owners", ("name", "email"), "flats", "owner_id", ("street", "condition"),
           ("rooms", "rent"), "listed_on", ("Mill Lane", "Station Road", "High Street")),
)  # fmt: skip
ASKED = (
    "the {n} {child} with the highest {number}, with the {pword} of their row in {parent}",
    "for each {pword} in {parent}, the sum and the average of {number} over its {child}",
    "how many {child} there are for each {word}, the most frequent first",
    "all {child} in which {word0} is '{value}' and {number} is above {limit}, newest first",
    "every row of {parent} that has no row in {child} since {year}",
    "for each month of {year}, the number of {child} and the total {number}",
    "the {parent} with more than {n} {child} in {year}",
    "the average {number} of the {child} for each {word}, only where there are at least {n} of them",
    "for each row of {parent}, its latest row in {child} by {date}",
    "the share of the {child} whose {word0} is '{value}', in percent, for each {pword}",
    "the {child} whose {number} is above the average {number} of all {child}",
    "a running total of {number} over the {child} of {year}, ordered by {date}",
    "the second highest {number} among the {child} of each row of {parent}",
    "the difference of the total {number} between {year} and the year before, for each {pword}",
)
TASKS = (
    "{ddl}\n\nWrite one SQL query that gives {what}.",
    "Given these tables of {about}:\n\n{ddl}\n\nWrite a SQL query for {what}. Answer with the query only.",
    "I have this schema:\n\n{ddl}\n\nHow do I get {what} in SQL? Explain the query in two sentences.",
    "Schema of {about}:\n{ddl}\n\nTask: give {what}. Return a single SELECT statement.",
)
CHANGES = (
    "{ddl}\n\nWrite an UPDATE statement that sets {word0} to '{value}' for all {child} with {number} above {limit}.",
    "{ddl}\n\nWrite an INSERT statement that adds three example rows to {child}.",
    "{ddl}\n\nDelete all {child} from before {year} in SQL, but only those with {number} under {limit}.",
    "{ddl}\n\nWrite a CREATE VIEW statement for {what}.",
    "{ddl}\n\nWhich index would make it faster to find {what}? Write the CREATE INDEX statement.",
)


def prompts(count: int, seed: int) -> list[str]:
    """`count` different prompts, the same for the same seed; raises ValueError for more than there can be."""
    rng, made = Random(seed), dict[str, None]()
    for _ in range(100 * count):
        if len(made) == count:
            return list(made)
        schema = rng.choice(SCHEMAS)
        names = dict(
            about=schema.about, parent=schema.parent, child=schema.child, date=schema.date, word0=schema.words[0],
            word=rng.choice(schema.words), pword=rng.choice(schema.parent_words), number=rng.choice(schema.numbers),
            value=rng.choice(schema.values), n=rng.randint(2, 20), limit=rng.choice((5, 10, 25, 50, 100, 250)),
            year=rng.randint(2015, 2025), ddl=schema.ddl(),
        )  # fmt: skip
        what = rng.choice(ASKED).format(**names)
        task = rng.choice(CHANGES if rng.random() < 0.2 else TASKS)
        made[task.format(what=what, **names)] = None
    raise ValueError(f"count is {count}; there are not so many different prompts.")


def main(
    out: Annotated[Path, typer.Option(help="JSONL to write, lines with `prompt`")],
    count: int = 600,
    seed: int = 1,
) -> None:
    """Writes text-to-SQL prompts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": text, "kind": "code"}) + "\n" for text in prompts(count, seed)]
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} prompts: {out}")


if __name__ == "__main__":
    typer.run(main)
