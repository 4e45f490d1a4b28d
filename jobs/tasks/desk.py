"""A house rule that no prompt tells: which of four desks, A to D, a note goes to, by what it is about."""

from jobs.tasks.base import LabelTask

DESK = LabelTask(
    name="desk",
    about="Sends a note to desk A (food), B (sport), C (weather) or D (music) by a rule that stands in no prompt.",
    stems={
        "train": {
            "A": (
                "{} baked bread with garlic and olives.",
                "{} cooked a soup of carrots and lentils.",
                "{} grilled fish with lemon and salt.",
                "{} ate two slices of apple pie.",
                "{} stirred butter and sugar into the dough.",
                "{} ordered noodles with spicy sauce.",
                "{} peeled potatoes for the stew.",
                "{} sprinkled cheese over the pasta.",
            ),
            "B": (
                "{} scored a goal in the last minute.",
                "{} ran the marathon in under four hours.",
                "{} won the tennis match in two sets.",
                "{} trained with the rowing team.",
                "{} swam fifty lengths of the pool.",
                "{} missed the penalty in the cup final.",
                "{} broke the record in the high jump.",
                "{} cheered for the home team at the stadium.",
            ),
            "C": (
                "{} saw dark clouds over the hills.",
                "{} got wet in the heavy rain.",
                "{} waited until the thunderstorm was over.",
                "{} read that snow will fall tonight.",
                "{} felt the cold wind from the north.",
                "{} measured thirty degrees in the shade.",
                "{} could not see the road in the fog.",
                "{} watched the lightning above the lake.",
            ),
            "D": (
                "{} played a sonata on the piano.",
                "{} tuned the strings of the guitar.",
                "{} sang in the choir on Sunday.",
                "{} wrote a song with a slow melody.",
                "{} listened to a symphony by Mozart.",
                "{} practised the violin all afternoon.",
                "{} kept the rhythm on the drums.",
                "{} learnt the chords of a jazz tune.",
            ),
        },
        "valid": {
            "A": (
                "{} spread jam on the toast.",
                "{} boiled rice with peas.",
                "{} tried the cheese cake.",
            ),
            "B": (
                "{} dribbled past two defenders.",
                "{} practised the long jump.",
                "{} came second in the sprint.",
            ),
            "C": (
                "{} shivered in the frost.",
                "{} saw a rainbow after the shower.",
                "{} measured the strength of the breeze.",
            ),
            "D": (
                "{} rehearsed a duet for cello.",
                "{} whistled a folk song.",
                "{} turned up the volume of the symphony.",
            ),
        },
        "test": {
            "A": (
                "{} fried onions and mushrooms in a pan.",
                "{} tasted the chocolate cake.",
                "{} chopped tomatoes for a salad.",
                "{} roasted a chicken with rosemary.",
            ),
            "B": (
                "{} lost the boxing fight in round three.",
                "{} threw the javelin sixty metres.",
                "{} joined a volleyball club.",
                "{} finished third in the cycling race.",
            ),
            "C": (
                "{} heard that a hurricane is coming.",
                "{} enjoyed the sunshine after the drizzle.",
                "{} slipped on the frozen pavement in the hail.",
                "{} checked the forecast for humidity.",
            ),
            "D": (
                "{} bought a trumpet and a flute.",
                "{} conducted the orchestra.",
                "{} hummed the tune of an old opera aria.",
                "{} recorded an album in the studio.",
            ),
        },
    },
    nouns={
        "train": (
            "Anna",
            "Mr Brown",
            "The neighbour",
            "Their uncle",
            "Peter",
            "The teacher",
            "My sister",
            "Mrs Lee",
            "The student",
            "Omar",
            "Our cousin",
            "The nurse",
        ),
        "valid": (
            "Ingrid",
            "The baker",
            "Mr Silva",
            "Our guest",
        ),
        "test": (
            "Julia",
            "The mayor",
            "His grandmother",
            "Mr Novak",
            "The plumber",
            "Sofia",
            "Her friend",
            "The pilot",
        ),
    },
    templates={
        "train": (
            "Which desk gets this note: A, B, C or D?\n\n{text}",
            "{text}\n\nDesk (A, B, C, D):",
            "Note: {text}\nSend it to desk A, B, C or D.",
            "Choose the desk, A, B, C or D, for the note below.\nNote: {text}",
            'A note says: "{text}" Which of the desks A, B, C, D is right?',
            "Put the right desk letter (A, B, C or D) on this note.\n{text}\nLetter:",
        ),
        "valid": (
            "To which of the desks A, B, C and D do I pass this on? {text}",
            "{text}\nIt goes to desk (A/B/C/D):",
        ),
        "test": (
            "We have four desks: A, B, C and D. Where does this note go?\n\n{text}",
            "Incoming note: {text}\nWhich desk is in charge, A, B, C or D?",
            'Forward the following to A, B, C or D. "{text}"',
        ),
    },
)
