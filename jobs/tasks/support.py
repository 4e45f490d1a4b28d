"""Which of four queues a customer's message belongs to. The product named in it never tells."""

from jobs.tasks.base import LabelTask

SUPPORT = LabelTask(
    name="support",
    about="Routes a customer's message to one of the queues payment, delivery, account or technical.",
    stems={
        "train": {
            "payment": (
                "I was charged twice for the {}.",
                "The invoice for my {} shows the wrong amount.",
                "Please refund the money that I paid for the {}.",
                "Why did you take an extra fee from my card for the {}?",
                "The discount was not applied when I paid for the {}.",
                "I want my money back for the {}.",
                "My credit card statement lists the {} at a higher price.",
                "Can I pay for the {} in three instalments?",
            ),
            "delivery": (
                "My {} has still not arrived.",
                "The courier left the {} at the wrong address.",
                "When will you ship the {} that I ordered?",
                "The tracking page says that the {} is stuck in transit.",
                "The parcel with the {} was damaged on the way.",
                "Nobody was at home when the driver brought the {}.",
                "Can you send the {} to another street?",
                "I have been waiting two weeks for the {} to be dispatched.",
            ),
            "account": (
                "I forgot the password that I used to order the {}.",
                "I cannot log in to see my {} order.",
                "Please change the email address on my profile; I bought a {}.",
                "Someone else has signed in as me and looked at the {}.",
                "How do I close my membership? I only wanted a {}.",
                "My user name is locked since I ordered the {}.",
                "I want to delete my personal data after buying the {}.",
                "The sign-up form for the {} says that my email is already taken.",
            ),
            "technical": (
                "The {} does not switch on any more.",
                "The {} crashes whenever I press the button.",
                "My {} makes a strange noise and then stops.",
                "The {} shows error code 12.",
                "How do I reset the {} to its factory settings?",
                "The battery of the {} is empty after ten minutes.",
                "The {} does not connect to the wireless network.",
                "After the update the screen of the {} stays black.",
            ),
        },
        "valid": {
            "payment": (
                "The price that I was billed for the {} is too high.",
                "My voucher was refused when I bought the {}.",
                "You owe me a refund for the {}.",
            ),
            "delivery": (
                "The carrier lost my {}.",
                "My {} was sent to an old address of mine.",
                "The shipment of the {} is late again.",
            ),
            "account": (
                "I need a new password before I can buy the {}.",
                "Please remove my profile; I never ordered a {}.",
                "My login stopped working after I bought the {}.",
            ),
            "technical": (
                "The {} beeps and will not start.",
                "The cable of the {} gets hot and smells burnt.",
                "The {} restarts by itself every hour.",
            ),
        },
        "test": {
            "payment": (
                "You charged me for a {} that I never bought.",
                "The receipt for the {} has the wrong tax on it.",
                "I cancelled the {} and my money was not returned.",
                "My bank says you debited the {} two times.",
            ),
            "delivery": (
                "The postman never brought my {}.",
                "Where is the package with my {} now?",
                "The {} was supposed to be here last Monday.",
                "The box with the {} came to my neighbour instead of me.",
            ),
            "account": (
                "The link to reset my password for the {} shop does not come.",
                "I would like to update my login details before I buy a {}.",
                "My profile was blocked after I looked at the {}.",
                "How can I register with a new email to order the {}?",
            ),
            "technical": (
                "The {} freezes after a few seconds.",
                "My {} overheats and turns itself off.",
                "The {} is not recognised when I plug it in.",
                "The display of the {} flickers all the time.",
            ),
        },
    },
    nouns={
        "train": (
            "printer",
            "kettle",
            "tablet",
            "camera",
            "vacuum cleaner",
            "radio",
            "smart watch",
            "coffee machine",
            "keyboard",
            "lamp",
            "phone",
            "fan",
        ),
        "valid": (
            "mixer",
            "monitor",
            "bicycle computer",
            "alarm clock",
        ),
        "test": (
            "toaster",
            "laptop",
            "speaker",
            "drone",
            "heater",
            "router",
            "doorbell",
            "projector",
        ),
    },
    templates={
        "train": (
            "Which queue does this message belong to: payment, delivery, account or technical?\n\n{text}",
            "{text}\n\nSort this customer message: payment, delivery, account or technical.",
            "Message: {text}\nQueue (payment, delivery, account, technical):",
            "Choose one of payment, delivery, account, technical for the message below.\nMessage: {text}",
            'A customer wrote: "{text}" Is this about payment, delivery, account or technical?',
            "Label the ticket with payment, delivery, account or technical.\nTicket: {text}\nLabel:",
        ),
        "valid": (
            "Who should deal with this: payment, delivery, account or technical? {text}",
            "Customer: {text}\nTeam (one of payment, delivery, account, technical):",
        ),
        "test": (
            "Support ticket: {text}\nWhich team should answer it? payment, delivery, account or technical",
            "We have four teams: payment, delivery, account, technical. Who handles this?\n\n{text}",
            'Classify the request into payment, delivery, account or technical. Request: "{text}"',
        ),
    },
)
