"""Shows in ComfyUI's page what Forebay does: which pages have memory, what is streamed, RAM; sets the headroom.

Comes with ``python -m forebay.comfyui``; or copy this folder into ComfyUI's ``custom_nodes``.
"""

from aiohttp import web
from server import PromptServer

from forebay.comfyui import panel

NODE_CLASS_MAPPINGS = {}
WEB_DIRECTORY = "./web"


def _add_routes(routes: web.RouteTableDef) -> None:
    @routes.get("/forebay/state")
    async def state(_: web.Request) -> web.Response:
        return web.json_response(panel.state())

    @routes.post("/forebay/headroom")
    async def headroom(request: web.Request) -> web.Response:
        try:
            wanted = await request.json()
            panel.set_headroom(wanted["device"], wanted["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            return web.json_response({"error": str(error.args[0])}, status=400)
        return web.json_response(panel.state())


# The folder may be found twice: beside the launcher's, and where somebody copied it to.
if not any(getattr(route, "path", None) == "/forebay/state" for route in PromptServer.instance.routes):
    _add_routes(PromptServer.instance.routes)
else:
    WEB_DIRECTORY = None
