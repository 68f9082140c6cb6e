"""POST /v1/messages: one request of Anthropic's Messages API, from its body to its answer."""

from fastapi.responses import JSONResponse, Response

from deployments.access.calls import Call
from deployments.generation.chats import Chats, stream_answer
from deployments.generation.generate import collect, merge
from deployments.messages.body import MessagesBody
from deployments.messages.format import MessageFormat


async def create_message(call: Call, body: MessagesBody, chats: Chats) -> Response:
    """The message, whole or as events. Raises RequestError, and as `generate` does."""
    chat = body.chat()
    running = await chats.start(call, chat, chat.sampling())
    out = MessageFormat(body.model, running.prompt_tokens, body.max_tokens)
    if body.stream:
        return await stream_answer(call, running.chunks, out)
    [choice] = await collect(merge([running.chunks], 1), 1)
    call.outcome = "ok"
    return JSONResponse(out.whole(choice))
