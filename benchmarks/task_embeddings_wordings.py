"""The prompts of `benchmarks.task_embeddings`: ten of varied quality for each of six tasks, three for each of others.

Plain completions, for as a chat the default backbone answers tasks of labels at chance. Every verbaliser is one token
of its tokenizer, the space before it included. Written before anything was measured with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How a model is asked: a text goes where `{text}` stands, and the answer follows after a space."""

    template: str
    words: Mapping[str, str]
    """The task's label -> the word that stands for it."""


def _worded(labels: Sequence[str], *prompts: tuple[str, str]) -> tuple[Wording, ...]:
    """`prompts`: templates and the words of `labels` in their order, one string."""
    return tuple(Wording(template, dict(zip(labels, words.split(), strict=True))) for template, words in prompts)


_SENTIMENT = ("negative", "positive")
_POSITIVE = "negative positive"
_TREC = ("abbreviation", "description", "entity", "human", "location", "number")
_TOPIC = ("Business", "Sci/Tech", "Sports", "World")
_SPAM = ("ham", "spam")
_OFFENCE = ("not-offensive", "offensive")
_EMOTION = ("anger", "joy", "optimism", "sadness")

TEN: Mapping[str, tuple[Wording, ...]] = {
    "sst2": _worded(
        _SENTIMENT,
        ("Review: {text}\nSentiment:", _POSITIVE),
        ("{text}\nIs this review positive or negative? It is", _POSITIVE),
        ("{text} All in all, the film was", "terrible great"),
        ("A critic wrote: {text}\nDid the critic like the film? Answer yes or no:", "no yes"),
        (
            "Review: a moving and beautifully acted story\nSentiment: positive\n\n"
            "Review: dull, loud and far too long\nSentiment: negative\n\nReview: {text}\nSentiment:",
            _POSITIVE,
        ),
        (
            "a joy from start to finish => good\nnothing here is worth your time => bad\n"
            "the cast is wonderful => good\na complete mess of a movie => bad\n{text} =>",
            "bad good",
        ),
        ("{text}\nMy friend says the film is", "bad good"),
        ("Text: {text}\nAnswer:", _POSITIVE),
        ("{text}\nThe film gets this many stars:", "one five"),
        ("Translate into the language of moods. {text} Colour:", "black white"),
    ),
    "ag_news": _worded(
        _TOPIC,
        ("News: {text}\nTopic:", "business technology sports world"),
        ("{text}\nThis article belongs in the section", "Business Technology Sports World"),
        ("Article: {text}\nIs it about business, science, sports or politics? It is about",
         "business science sports politics"),
        ("Category: world, sports, business, technology.\nText: {text}\nCategory:",
         "business technology sports world"),
        (
            "Text: The team won the final in extra time.\nSection: sports\n\n"
            "Text: Shares fell after the bank cut its forecast.\nSection: business\n\n"
            "Text: The minister met rebels to talk about peace.\nSection: world\n\n"
            "Text: A new chip makes phones faster.\nSection: technology\n\nText: {text}\nSection:",
            "business technology sports world",
        ),
        ("{text}\nKeywords:", "economy computer game war"),
        ("{text}\nWho should read this? People interested in", "money computers sports politics"),
        ("Text: {text}\nAnswer:", "business technology sports world"),
        ("{text}\nThe letter of this item is", "C D B A"),
        ("I like {text} My favourite hobby is", "business technology sports world"),
    ),
    "sms_spam": _worded(
        _SPAM,
        ("Message: {text}\nIs this message spam? Answer:", "no yes"),
        ("SMS: {text}\nType (personal or advertisement):", "personal advertisement"),
        ("{text}\nThis message was sent by a", "friend company"),
        ("Text message: {text}\nIs it real or fake? It is", "real fake"),
        (
            "Message: See you at home tonight\nSpam: no\n\nMessage: WINNER! Call now to claim your free prize\n"
            "Spam: yes\n\nMessage: {text}\nSpam:",
            "no yes",
        ),
        (
            "are you coming to the party? => normal\nFREE ringtones, text WIN to 80082 => spam\n"
            "ok, call me later => normal\nUrgent! You have won a holiday => spam\n{text} =>",
            "normal spam",
        ),
        ("Should I trust this message? {text}\nAnswer:", "yes no"),
        ("Text: {text}\nLabel:", "safe spam"),
        ("{text}\nReply:", "ok stop"),
        ("The weather today is fine. {text} Tomorrow it will be", "warm cold"),
    ),
    "tweet_offensive": _worded(
        _OFFENCE,
        ("Tweet: {text}\nIs this tweet offensive? Answer:", "no yes"),
        ("Comment: {text}\nTone (polite or rude):", "polite rude"),
        ("{text}\nThe person who wrote this is", "nice mean"),
        ("{text}\nA moderator would find this comment", "acceptable offensive"),
        (
            "Tweet: Congratulations to the whole team!\nOffensive: no\n\nTweet: Shut up, you stupid idiot\n"
            "Offensive: yes\n\nTweet: {text}\nOffensive:",
            "no yes",
        ),
        (
            "what a lovely morning => fine\nyou are a disgusting liar => insult\n"
            "the bus leaves at nine => fine\nthis moron should be in jail => insult\n{text} =>",
            "fine insult",
        ),
        ("{text}\nShould this be deleted? Answer yes or no:", "no yes"),
        ("Text: {text}\nAnswer:", "fine offensive"),
        ("{text}\nSwear words in this text:", "none many"),
        ("Once upon a time, {text} The end was", "happy sad"),
    ),
    "trec": _worded(
        _TREC,
        ("Question: {text}\nThe answer is a", "word description thing person place number"),
        ("{text}\nWhat does this question ask for? It asks for a", "term definition thing person place number"),
        ("Q: {text}\nAnswer type:", "abbreviation description entity human location number"),
        ("Choose one: abbreviation, description, entity, human, location, number.\nQuestion: {text}\nChoice:",
         "abbreviation description entity human location number"),
        (
            "Question: Who wrote Hamlet?\nType: person\n\nQuestion: Where is Kenya?\nType: place\n\n"
            "Question: How many days are in a year?\nType: number\n\nQuestion: What is gravity?\nType: description\n\n"
            "Question: What animal barks?\nType: thing\n\nQuestion: What does NATO stand for?\nType: abbreviation\n\n"
            "Question: {text}\nType:",
            "abbreviation description thing person place number",
        ),
        ("Who was the first king? => person\nWhere is the tower? => place\nHow far is it? => number\n{text} =>",
         "word description thing person place number"),
        ("{text}\nTo answer I need to know a", "word meaning thing name city number"),
        ("Text: {text}\nAnswer:", "abbreviation description entity human location number"),
        ("{text}\nThe letter of this item is", "A B C D E F"),
        ("I am hungry. {text} Dinner is", "abbreviation description entity human location number"),
    ),
    "tweet_emotion": _worded(
        _EMOTION,
        ("Tweet: {text}\nEmotion:", "anger joy hope sadness"),
        ("{text}\nThe person who wrote this feels", "angry happy hopeful sad"),
        ("{text}\nIs the writer angry, happy, hopeful or sad? The writer is", "angry happy hopeful sad"),
        ("Emotions: anger, joy, hope, sadness.\nText: {text}\nEmotion:", "anger joy hope sadness"),
        (
            "Tweet: I cannot believe they lied to us again!\nEmotion: anger\n\nTweet: Best birthday ever!\n"
            "Emotion: joy\n\nTweet: Keep going, better days will come\nEmotion: hope\n\n"
            "Tweet: I miss her so much\nEmotion: sadness\n\nTweet: {text}\nEmotion:",
            "anger joy hope sadness",
        ),
        (
            "how dare you => angry\nwe won! => happy\ntomorrow will be better => hopeful\n"
            "I cried all night => sad\n{text} =>",
            "angry happy hopeful sad",
        ),
        ("{text}\nThe best hashtag for this is #", "rage fun hope sad"),
        ("Text: {text}\nAnswer:", "anger joy hope sadness"),
        ("{text}\nThe letter of this item is", "A B C D"),
        ("The price of bread: {text} The colour of the car is", "red yellow green blue"),
    ),
}  # fmt: skip
"""By data set; the last two or three of each say little or nothing of the task."""

THREE: Mapping[str, tuple[Wording, ...]] = {
    **{name: (prompts[0], prompts[1], prompts[4]) for name, prompts in TEN.items()},
    "snips": _worded(
        ("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork",
         "SearchScreeningEvent"),
        ("Command: {text}\nThe command is about a", "list restaurant weather song book show cinema"),
        ("{text}\nThis request is for the app called", "list restaurant weather music book show cinema"),
        (
            "Add this to my favourites => list\nBook a table for two => restaurant\nWill it rain => weather\n"
            "Play some jazz => music\nGive this novel five stars => book\nFind the show Friends => show\n"
            "When is the film on tonight => cinema\n{text} =>",
            "list restaurant weather music book show cinema",
        ),
    ),
    "number": _worded(
        ("no", "yes"),
        ("Text: {text}\nDoes the text contain a number? Answer:", "no yes"),
        ("{text}\nAre there any digits in this sentence, yes or no?", "no yes"),
        (
            "Text: There were 12 dogs\nNumber: yes\n\nText: The dogs were asleep\nNumber: no\n\nText: {text}\nNumber:",
            "no yes",
        ),
    ),
    "question": _worded(
        ("no", "yes"),
        ("Text: {text}\nIs this a question? Answer:", "no yes"),
        ("{text}\nThe line above is a", "statement question"),
        (
            "Text: Where do you live?\nQuestion: yes\n\nText: I live in a small town.\nQuestion: no\n\n"
            "Text: {text}\nQuestion:",
            "no yes",
        ),
    ),
}  # fmt: skip
"""The same question put three ways: plainly, in other words, and with examples."""
