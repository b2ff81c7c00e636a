"""The test string: a refusal on request, so that those who write clients can see how theirs handles one.

Only if the settings say so, and only for a request whose last message (or a whole prompt) is the string and
nothing else: text from elsewhere that merely holds it, a web page say, must not end a conversation. The
engine does not see such a request. All that the string can do is to refuse; it changes nothing about others.
"""

from __future__ import annotations

from service.chat_body import ChatBody
from service.completion_body import CompletionBody

TEST_STRING = "NEURONGUARD_TEST_REFUSAL_7d1c0a5e94b84f3c8a6e2f1b3d905c47"
ASKED = "test"
"""What stands in the audit log in place of a verdict."""
HEADER = "x-guard-test"


def asked_for(body: ChatBody | CompletionBody) -> bool:
    """Whether a request asks to be refused."""
    if isinstance(body, CompletionBody):
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return any(prompt == TEST_STRING for prompt in prompts)
    content = body.messages[-1].content
    if not isinstance(content, str):
        content = "".join(part.text for part in content or ())
    return content == TEST_STRING
