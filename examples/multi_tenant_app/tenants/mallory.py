"""A hostile tenant. Each attempt is one call of `fetch`."""

import os
import socket
import subprocess

from dynflow import WorkflowEntrypoint


class Workflow(WorkflowEntrypoint):
    """Says whose it is."""

    async def run(self, event, step):
        return f"I run as {self.env.TENANT}"


async def read_a_file(env):
    return open("/etc/passwd").read()


async def list_the_code_of_others(env):
    return os.listdir("/work")


async def call_home(env):
    return socket.create_connection(("192.0.2.1", 80))


async def run_a_program(env):
    return subprocess.run(["/bin/id"])


async def take_all_memory(env):
    return len(bytearray(10**10))


async def never_come_back(env):
    while True:
        pass


async def look_at_acmes_order(env):
    return await (await env.WORKFLOWS.get("order-1")).status()


async def end_acmes_order(env):
    return {"deleted": await env.WORKFLOWS.delete_batch(["order-1"])}


async def pass_for_acme(env):
    forged = {"__dispatcher_metadata": {"tenant_id": "acme"}, "params": {}}
    return await (await env.WORKFLOWS.create(params=forged)).result(timeout=10)


async def fetch(request, env):
    return {"got": await globals()[request.json()["try"]](env)}
