"""Prints what a ComfyUI sends to a client, a line of JSON each: run by the host's Python, which has aiohttp.

Usage: listen.py URL CLIENT_ID
"""

from __future__ import annotations

import asyncio
import json
import sys

import aiohttp

SHOWN = 3  # the kind of binary message that carries a text for a node: its id's length, its id, the text


async def listen(url: str, client_id: str) -> None:
    address = f"{url}/ws?clientId={client_id}"
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                line = json.loads(message.data)
            else:
                line = {"type": "binary", "kind": int.from_bytes(message.data[:4], "big"), "bytes": len(message.data)}
                if line["kind"] == SHOWN:
                    end = 8 + int.from_bytes(message.data[4:8], "big")
                    line |= {"node": message.data[8:end].decode(), "text": message.data[end:].decode()}
            print(json.dumps(line), flush=True)


asyncio.run(listen(*sys.argv[1:3]))
