"""The templates of the test split: same meanings as in `wording_train.py`, other wording."""

from __future__ import annotations

from wording import Wording

ISSUES: dict[str, dict[str, tuple[str, ...]]] = {
    "damaged": {
        "any": (
            "{item} came cracked in two places",
            "{item} reached me <badly damaged|broken and scratched>",
            "after unboxing I saw that {item} is <broken|cracked> at the bottom",
            "there is a large crack in {item}, fresh from the package",
            "the carton had been crushed, so {item} is <cracked|damaged> too",
            "{item} showed up scratched and chipped",
            "shipping was rough and {item} is <smashed|broken> now",
            "when it was delivered {item} had a broken corner",
            "the wrapping was torn and {item} is chipped now",
        ),
        "screen": ("the box looked fine but {item} has a cracked screen",),
        "electric": ("{item} had a big dent on arrival", "the back of {item} is badly dented"),
        "assemble": ("the frame of {item} arrived bent",),
    },
    "late": {
        "any": (
            "{item} has yet to arrive",
            "still no delivery, {item} is very late",
            "we keep waiting and {item} is not coming",
            "{item} was due to arrive <a week ago|last Friday> and is not here",
            "why is {item} so delayed?",
            "the shipment of {item} is overdue",
            "the courier still has not brought {item}",
            "tracking shows no movement, {item} was never delivered",
            "I have been waiting for {item} for far too long",
            "our parcel with {item} must be stuck at your depot",
        ),
    },
    "wrong_item": {
        "any": (
            "the wrong <product|model> was delivered",
            "we got a different <item|model> from the one we chose",
            "inside the parcel was another product, not {item}",
            "you have sent the wrong thing, a different item came",
            "my order was mixed up and the wrong <size|colour|version> came",
            "somebody packed another model, not the one I ordered",
            "the colour I got is wrong, it should be <black|white>",
            "this parcel has a product in it that we never ordered",
        ),
        "embed": (
            "a totally different item came instead of {item}",
            "I unwrapped the parcel expecting {item} and it is the wrong product",
        ),
    },
    "refund": {
        "any": (
            "the money for {item} has not been refunded yet",
            "when do I get the money back that I paid for {item}?",
            "no refund for {item} has shown up on my card",
            "I gave {item} back and am waiting for the refund",
            "the return of {item} was accepted but no refund came",
            "you still owe me the refund for {item}",
            "I cancelled {item}, please pay back my money",
            "my account still shows no refund of {item}",
            "I need my money back, {item} was cancelled",
        ),
    },
    "warranty": {
        "any": (
            "{item} is faulty now, can I claim the warranty?",
            "{item} has developed a defect, is that under guarantee?",
            "please check the warranty of {item}, it needs repairing",
            "{item} broke, does the guarantee still count after these months?",
            "I would like {item} repaired within the warranty",
            "who handles warranty claims about {item}?",
            "the guarantee for {item} should cover this defect",
        ),
        "electric": (
            "{item} quit working after several months, is that a warranty case?",
            "{item} doesn't turn on anymore but is still within warranty",
        ),
    },
    "billing": {
        "any": (
            "a double payment was taken for {item}",
            "{item} shows up two times on my credit card bill",
            "could you correct the invoice of {item}?",
            "no invoice came with {item}, I need one for my taxes",
            "I have been overcharged for {item}",
            "I was billed a higher price for {item} than advertised",
            "my voucher was ignored on the bill for {item}",
            "{item} was charged to my card twice",
        ),
    },
    "setup": {
        "any": (
            "the setup guide for {item} is confusing",
            "I don't understand the manual of {item}",
        ),
        "device": (
            "I am unable to set up {item}",
            "could you explain the installation of {item}?",
            "I can't get {item} installed",
            "configuring {item} is not working out for me",
            "the installation of {item} stops with an error",
            "is there anybody who can help me install {item}?",
        ),
        "app": (
            "{item} refuses to connect with my phone",
            "pairing {item} keeps failing in the app",
        ),
        "assemble": (
            "the assembly of {item} is not clear to me",
            "which parts of {item} do I assemble first?",
        ),
    },
    "return": {
        "any": (
            "I wish to return {item}",
            "{item} doesn't suit me and I'd rather send it back",
            "could I get a label to return {item}?",
            "{item} is not what we need, we would rather return it",
            "what are the steps for sending {item} back?",
            "we decided against {item} and plan to return it",
            "may {item} be returned if the box is open?",
            "{item} is too big, where can I send it back?",
            "I don't want {item} anymore, so it should go back to you",
        ),
    },
}

HELDOUT = Wording(
    greetings=(
        "good afternoon", "hey there", "dear customer service", "hello support", "good evening",
        "hey team", "guten Tag", "ciao", "hi everybody",
    ),
    intros=(
        "my name's {customer}", "the name is {customer}", "it's {customer} writing",
        "{customer} speaking", "I am a customer of yours, {customer}",
    ),
    signoffs=(
        "best wishes,\n{customer}", "many thanks, {customer}", "-- {customer}",
        "yours sincerely,\n{customer}", "warm regards,\n{customer}", "thanks a lot,\n{customer}",
        "gracias,\n{customer}", "all the best, {customer}", "~ {customer}",
    ),
    closings=("many thanks", "thank you very much", "best wishes", "thanks a lot"),
    leads={
        "product": (
            "I have something to ask concerning our {product}:",
            "I got myself <the|a> {product}",
            "I need your help with the {product}:",
            "we have an issue with the {product}:",
            "our purchase was <the|a> {product}",
        ),
        "product+order": (
            "concerning the {product}, order number {order}:",
            "I chose the {product} in order {order}",
            "we have an issue with the {product}, order {order}:",
        ),
        "product+date": (
            "back on {date} I ordered the {product}",
            "we purchased <the|a> {product} on {date}",
            "our {product} was purchased on {date}",
        ),
        "product+order+date": (
            "we purchased the {product} on {date} with order {order}",
            "concerning the {product}, ordered {date} as order {order}:",
        ),
        "order": ("I need your help with order {order}:", "concerning order number {order}:"),
        "date": ("we purchased an item on {date}", "I made a purchase on {date}"),
        "order+date": (
            "we made order {order} on {date}", "concerning order {order}, placed {date}:",
        ),
    },
    items={
        "product": ("our {product}", "this {product}", "the {product} from your shop"),
        "product+order": (
            "our {product} (our order {order})", "this {product} (order no. {order})",
        ),
        "product+date": (
            "the {product} we <ordered|bought> on {date}", "our {product} (purchased {date})",
        ),
        "product+order+date": ("the {product} we bought on {date} (order no. {order})",),
        "order": ("our order {order}", "our order ({order})"),
        "date": ("our order from {date}", "the order we placed on {date}"),
        "order+date": ("our order {order} from {date}",),
        "noun+order": ("{noun} of order {order}",),
        "noun+date": ("{noun} we bought on {date}",),
        "noun+order+date": ("{noun} of order {order} from {date}",),
    },
    nouns={
        "order": ("our order", "this order"),
        "goods": ("the product", "the article"),
        "device": ("the gadget", "the machine"),
        "expected": ("the thing we ordered", "the product I ordered"),
    },
    headers={
        "order": ("about order {order}", "my order's number: {order}"),
        "date": ("purchased on {date}", "order date: {date}"),
        "order+date": ("about order {order} from {date}",),
    },
    follows={
        "order": (
            "the number of my order is {order}", "that was order number {order}",
            "order reference: {order}", "our order number: {order}",
        ),
        "date": (
            "I made the purchase on {date}", "the order date was {date}",
            "we ordered it on {date}", "the purchase was on {date}",
        ),
        "order+date": (
            "that was order {order}, purchased on {date}",
            "order reference {order}, order date {date}",
        ),
    },
    issues=ISSUES,
    urgent_first=("very urgent", "I need help asap", "urgent please"),
    urgent=(
        "the matter is urgent", "please get back to me as soon as you can, it's urgent",
        "I must have <an answer|a reply> <by tomorrow|today>", "we need a solution immediately",
        "please hurry up", "this cannot wait any longer", "please handle this right away",
        "please respond asap", "today is my deadline", "I urgently need your help",
    ),
    urgent_item=("we need it tomorrow", "we have to use it this weekend"),
    urgent_by=("this must be solved before {date2}, please hurry",),
    calm=("there's no rush", "this is not urgent at all", "please take your time", "it can wait"),
    fillers=(
        "hoping for your help", "we are a bit disappointed", "I didn't find this in your FAQ",
        "please tell us what to do", "I can give more details if you want them",
        "normally your shop is great", "nobody answered my first mail",
    ),
    second_dates={
        "promised": ("you promised delivery for {date2}", "delivery was expected on {date2}"),
        "received": ("we received it on {date2}", "the package came on {date2}"),
        "started": ("the trouble started on {date2}",),
        "approved": ("the refund was confirmed on {date2}",),
        "charged": ("the charge on my account is from {date2}",),
        "callback": ("I am back home on {date2}", "could you ring me on {date2}?"),
    },
    numbers={
        "phone": ("my phone is {phone}", "phone: {phone}"),
        "amount": ("we paid {amount}", "the price is {amount}"),
        "tracking": ("tracking number: {tracking}",),
        "serial": ("serial number {serial}",),
    },
)  # fmt: skip
