"""A bare FastAPI route that echoes the raw body: what the framework and the server cost without a service.

``python echo.py PORT``
"""

import sys

import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()


@app.post("/echo")
async def echo(request: Request) -> Response:
    """The body as it came."""
    return Response(await request.body(), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
