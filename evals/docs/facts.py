"""Asks the example `long_document` about one sentence told near the beginning of a book, in a process of its own.

    python facts.py TARGET_FOLDER BOOK.txt BOOK.txt ..

Ten facts, each put at 0.7 % of 600,000 characters of a book and asked for in two ways. An answer is right if it holds
the word; the answers are printed for whoever wants to judge them otherwise.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

FACTS = [
    ("The lighthouse keeper's green parrot was named Marchbanks.",
     ("What was the green parrot named?", "marchbanks"),
     ("What is the name of the lighthouse keeper's parrot?", "marchbanks")),
    ("The code that opens the safe in the cellar is 4471.",
     ("What is the code of the safe?", "4471"),
     ("Which code opens the safe in the cellar?", "4471")),
    ("Doctor Ellery keeps the spare key under the blue flowerpot.",
     ("Where does Doctor Ellery keep the spare key?", "flowerpot"),
     ("Where is the spare key?", "flowerpot")),
    ("My sister Ottilie moved to Troms\u00f8 in order to study whales.",
     ("Where did my sister Ottilie move?", "troms"),
     ("What does Ottilie study?", "whale")),
    ("The password of the guest network is saffron-ladder.",
     ("What is the password of the guest network?", "saffron"),
     ("Tell me the guest network password.", "saffron")),
    ("Professor Quandt is allergic to walnuts.",
     ("What is Professor Quandt allergic to?", "walnut"),
     ("Which food must Professor Quandt avoid?", "walnut")),
    ("The ferry to Skarholm leaves at a quarter past six.",
     ("When does the ferry to Skarholm leave?", "quarter past six"),
     ("At what time does the ferry leave?", "quarter past six")),
    ("Our project's mascot is a purple hedgehog called Bixby.",
     ("What is our project's mascot called?", "bixby"),
     ("Which animal is the mascot of our project?", "hedgehog")),
    ("Captain Voss bought the schooner Albatross for nine hundred crowns.",
     ("How much did Captain Voss pay for the schooner?", "nine hundred"),
     ("Who bought the schooner Albatross?", "voss")),
    ("The meeting with the architect was moved to Thursday in Leiden.",
     ("To which day was the meeting with the architect moved?", "thursday"),
     ("In which city is the meeting with the architect?", "leiden")),
]


def run(*arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return done.stdout


def main():
    binary = f"{sys.argv[1]}/release/long_document"
    books = [pathlib.Path(book).read_text() for book in sys.argv[2:]]
    right = 0
    for i, (fact, *questions) in enumerate(FACTS):
        start = 100_000 + 150_000 * i
        text = books[i % len(books)][start:][:600_000]
        cut = text.index(". ", 4_200) + 2
        with tempfile.TemporaryDirectory() as folder:
            book, store = f"{folder}/book.txt", f"{folder}/fed"
            pathlib.Path(book).write_text(f"{text[:cut]}{fact} {text[cut:]}")
            run(binary, "--store", store, "--text", book)
            for j, (question, word) in enumerate(questions):
                shutil.copytree(store, f"{folder}/asked{j}")
                said = run(binary, "--store", f"{folder}/asked{j}", "--max-new-tokens", "48", "--ask", question)
                answer = said.split("\n", 2)[-1].strip()
                right += word in answer.lower()
                print("right" if word in answer.lower() else "wrong", "|", question, "|", answer[:120].replace("\n", " "))
    print(f"{right} of {sum(len(questions) for _, *questions in FACTS)}")


main()
