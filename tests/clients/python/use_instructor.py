"""instructor: models out of tool calls and of JSON, whole, in part, and several at once."""

import instructor
import openai
from common import BASE, MODEL, QUESTION, step
from pydantic import BaseModel, Field


class Report(BaseModel):
    """A report of the weather."""

    city: str = Field(max_length=20)
    sunny: bool
    days: list[int] = Field(max_length=3)


asked = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 400,
    "max_retries": 0,
}
# Mode.JSON is left out: it asks for any JSON object and describes the wanted one in words, which small models don't follow.
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=BASE, api_key="none", max_retries=0), mode=mode)
    with step(f"{mode}: whole"):
        assert isinstance(client.chat.completions.create(response_model=Report, **asked), Report)
    with step(f"{mode}: in part"):
        # Its schema is another one, whose fields may be left out.
        *_, last = client.chat.completions.create_partial(response_model=Report, **asked)
        assert isinstance(last.city, str) or last.sunny is not None or last.days is not None, last
