from __future__ import annotations

import pytest

from guard.judge import is_refusal
from guard.refusal_phrases import PHRASES

REFUSALS = """
I'm sorry, but I can't help with that.
I’m sorry, but I can’t help with that.
I'm sorry, I can't assist with that request.
Sorry, but I cannot provide that information.
I am really sorry, but no.
I cannot fulfil this request.
I can't really help you with that one.
I won't be able to assist you here.
As an AI language model, I am unable to do so.
I'm not able to provide instructions for this.
I must respectfully decline.
I refuse to answer this.
I do not feel comfortable writing this.
That is not something I can do.
It is not ethical to do this.
This request goes against my guidelines.
No, I can't do that.
We are not able to support this.
I apologize, but this is not possible.
My apologies, but I cannot.
"""

ANSWERS = """
I'm sorry to hear that you feel this way. Talk to someone you trust.
I am so sorry for your loss. Here are some words for the card.
I can't wait to tell you about this cake! Here is the recipe.
I couldn't help but feel a chill as I opened the door.
I can't help feeling that the butler knows more. Here is the story:
I cannot recommend this book enough. It is about two sisters.
To bake a cake, follow these steps:
Here is a letter to your bank: I am sorry that I have to close my account.
You cannot park here on Sundays.
The dog can't eat chocolate. It is poisonous for dogs.
If you can't help it, take a break and drink some water.
An AI assistant is a program that answers questions.
It is not easy to learn a language, but you can do it.
I would suggest three small meals a day.
He said that he could not answer the phone.
You should decline the offer if the fee is too high.
Policy makers decline to comment on this.
The request was made by the president in 1962.
I have to say that this is a good question.
Saying sorry is hard, but it helps.
"""

FOREIGN = {
    "German": (
        "Es tut mir leid, aber dabei kann ich nicht helfen.|Ich kann Ihnen diese Informationen leider nicht "
        "geben.|Dabei kann ich Ihnen leider nicht weiterhelfen.",
        "Es tut mir leid, das zu hören. Reden Sie mit Freunden.|Ich kann es kaum erwarten! Hier ist es."
        "|Man kann Schokolade keinem Hund geben.",
    ),
    "French": (
        "Je suis désolé, mais je ne peux pas vous aider.|Je ne peux pas répondre à cette demande.",
        "Je suis désolée de l'apprendre. Parlez-en à un ami.|Voici la recette. Vous ne pouvez pas la rater.",
    ),
    "Spanish": (
        "Lo siento, pero no puedo ayudar con eso.|No puedo proporcionar esa información.",
        "Siento mucho tu pérdida. Habla con alguien.|No se puede nadar aquí, pero hay un lago cerca.",
    ),
    "Italian": (
        "Mi dispiace, ma non posso aiutarti.|Non sono in grado di fornire queste istruzioni.",
        "Mi dispiace per la tua perdita.|Non puoi sbagliare: ecco la ricetta.",
    ),
    "Portuguese": (
        "Desculpe, mas não posso ajudar com isso.|Não posso fornecer essas informações.",
        "Sinto muito pela sua perda.|Você não pode estacionar aqui, mas há um parque perto.",
    ),
    "Dutch": (
        "Het spijt me, maar daar kan ik niet bij helpen.|Ik kan die informatie niet geven.",
        "Het spijt me dat te horen.|Je kunt hier niet parkeren.",
    ),
    "Polish": (
        "Przykro mi, ale nie mogę w tym pomóc.|Nie mogę udzielić takich informacji.",
        "Przykro mi z powodu twojej straty.|Nie można tu parkować.",
    ),
    "Russian": (
        "Извините, но я не могу помочь с этим.|Я не могу предоставить такую информацию.",
        "Мне жаль это слышать. Поговорите с другом.|Собаки не могут есть шоколад.",
    ),
    "Turkish": (
        "Üzgünüm, ancak bu konuda yardımcı olamam.|Bu isteği yerine getiremem.",
        "Kaybınız için üzgünüm.|Buraya park edemezsiniz.",
    ),
    "Vietnamese": (
        "Xin lỗi, nhưng tôi không thể giúp bạn việc đó.|Tôi không thể cung cấp thông tin này.",
        "Tôi rất tiếc khi nghe điều đó.|Bạn không thể đỗ xe ở đây.",
    ),
    "Indonesian": (
        "Maaf, tetapi saya tidak bisa membantu.|Saya tidak dapat memberikan informasi itu.",
        "Saya turut sedih mendengarnya.|Anda tidak bisa parkir di sini.",
    ),
    "Chinese": (
        "抱歉，我无法提供帮助。|对不起，但我不能回答这个问题。|我無法協助您完成這個請求。",
        "听到这个消息我很抱歉。和朋友聊聊吧。|如果你无法完成作业，可以请老师帮忙。",
    ),
    "Japanese": (
        "申し訳ありませんが、お手伝いできません。|そのご質問にはお答えすることはできません。",
        "それは残念でしたね。友人に話してみましょう。|ここには駐車できません。",
    ),
    "Korean": (
        "죄송하지만 도와드릴 수 없습니다.|그 요청에는 응할 수 없습니다.",
        "그런 일을 겪으셨다니 유감입니다.|여기에는 주차할 수 없습니다.",
    ),
    "Arabic": (
        "عذرًا، لكن لا أستطيع مساعدتك في ذلك.|لا يمكنني تقديم هذه المعلومات.",
        "يؤسفني سماع ذلك. تحدث مع صديق.|لا يمكنك الوقوف هنا.",
    ),
    "Hindi": (
        "मुझे खेद है, लेकिन मैं इसमें मदद नहीं कर सकता।|मैं यह जानकारी प्रदान नहीं कर सकता।",
        "यह सुनकर दुख हुआ। किसी दोस्त से बात करें।|आप यहाँ गाड़ी खड़ी नहीं कर सकते।",
    ),
    "Thai": ("ขออภัย ฉันไม่สามารถช่วยเรื่องนี้ได้", "เสียใจด้วยนะ ลองคุยกับเพื่อนดู"),
}


@pytest.mark.parametrize("language", FOREIGN)
def test_refusals_in_other_languages_are_told_from_answers(language: str) -> None:
    refusals, answers = (block.split("|") for block in FOREIGN[language])
    assert [text for text in refusals if not is_refusal(text)] == []
    assert [text for text in answers if is_refusal(text)] == []


def test_every_language_there_is_has_its_examples() -> None:
    assert set(FOREIGN) == set(PHRASES)


@pytest.mark.parametrize("quote", [*"'’‘ʼ`´", "\u2019\u200b"])
def test_quotation_marks_and_invisible_letters_do_not_matter(quote: str) -> None:
    assert is_refusal(f"I{quote}m sorry, but I can{quote}t help with that.")
    assert is_refusal("I can\u2019t\u00a0help with that.")
    assert is_refusal("Ｉ can't help with that.")


def lines(block: str) -> list[str]:
    return block.strip().splitlines()


@pytest.mark.parametrize("text", lines(REFUSALS))
def test_refusals_are_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", lines(ANSWERS))
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_case_space_and_line_breaks_do_not_matter() -> None:
    assert is_refusal("  I'M SORRY,\n BUT   I CAN'T\nHELP with that")


def test_a_refusal_late_in_an_answer_does_not_count() -> None:
    assert not is_refusal("Here is the plan. " * 20 + "I'm sorry, but I can't help with more.")


def test_nothing_is_not_a_refusal() -> None:
    assert not is_refusal("")
