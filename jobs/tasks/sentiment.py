"""Whether a remark is positive, negative or neutral."""

from jobs.tasks.base import LabelTask

SENTIMENT = LabelTask(
    name="sentiment",
    about="Tells whether a remark is positive, negative or neutral.",
    stems={
        "train": {
            "positive": (
                "The {} was a delight from beginning to end.",
                "I loved every minute of the {}.",
                "What a wonderful {}, I would go again tomorrow.",
                "The {} made my whole week brighter.",
                "I cannot praise the {} enough.",
                "The {} was even better than I had hoped.",
                "Everybody in our family enjoyed the {}.",
                "The {} deserves all the applause it got.",
            ),
            "negative": (
                "The {} was a waste of time and money.",
                "I regret that I ever went to the {}.",
                "What an awful {}, never again.",
                "The {} left me bored and angry.",
                "I cannot think of anything good about the {}.",
                "The {} was far worse than I had feared.",
                "Everybody in our family complained about the {}.",
                "The {} was a painful mess.",
            ),
            "neutral": (
                "The {} takes place on Tuesday at noon.",
                "The {} lasts about two hours.",
                "There were forty people at the {}.",
                "The {} is near the railway station.",
                "You can read about the {} on the second page.",
                "The {} was moved from March to April.",
                "They announced the {} by letter.",
                "The {} has had the same name since 1990.",
            ),
        },
        "valid": {
            "positive": (
                "The {} was a joy and I left smiling.",
                "An excellent {}, well worth the trip.",
                "I adored the {}.",
            ),
            "negative": (
                "The {} was a disappointment and I left early.",
                "A horrible {}, not worth the trip.",
                "I hated the {}.",
            ),
            "neutral": (
                "The {} begins after lunch.",
                "The doors of the {} are on the left side.",
                "The {} is held once a year.",
            ),
        },
        "test": {
            "positive": (
                "I am so happy that I saw the {}.",
                "The {} was superb and I recommend it warmly.",
                "A charming {} with a perfect ending.",
                "We had a fantastic time at the {}.",
            ),
            "negative": (
                "I am sorry that I paid for the {}.",
                "The {} was dreadful and I warn you against it.",
                "A dull {} with a terrible ending.",
                "We had a miserable time at the {}.",
            ),
            "neutral": (
                "The {} opens at nine in the morning.",
                "A bus goes to the {} every hour.",
                "The {} is listed in the town calendar.",
                "Tickets for the {} are sold at the counter.",
            ),
        },
    },
    nouns={
        "train": (
            "concert",
            "film",
            "exhibition",
            "play",
            "lecture",
            "dinner",
            "museum",
            "parade",
            "workshop",
            "cruise",
            "musical",
            "festival",
        ),
        "valid": (
            "quiz night",
            "magic show",
            "boat trip",
            "flea market",
        ),
        "test": (
            "opera",
            "circus",
            "guided tour",
            "ballet",
            "book fair",
            "comedy show",
            "garden party",
            "recital",
        ),
    },
    templates={
        "train": (
            "Is this remark positive, negative or neutral?\n\n{text}",
            "{text}\n\nSentiment (positive, negative, neutral):",
            "Remark: {text}\nDecide: positive, negative or neutral.",
            "Tell me the mood of this sentence, positive, negative or neutral: {text}",
            'A visitor said: "{text}" Was that positive, negative or neutral?',
            "Rate the comment as positive, negative or neutral.\nComment: {text}\nRating:",
        ),
        "valid": (
            "Positive, negative or neutral? {text}",
            "Guest book: {text}\nThe entry is (positive, negative, neutral):",
        ),
        "test": (
            'How does the writer feel about it: positive, negative or neutral? "{text}"',
            "Review: {text}\nAnswer with positive, negative or neutral.",
            "Give the sentiment of the following text as positive, negative or neutral.\n\n{text}",
        ),
    },
)
