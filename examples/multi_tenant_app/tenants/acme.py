"""Acme's orders, as Acme wrote them. Runs on the platform, in a confined process."""

from dynflow import WorkflowEntrypoint


class Workflow(WorkflowEntrypoint):
    """An order: reserve, wait for the money, ship."""

    async def run(self, event, step):
        item = event.payload["item"]
        await step.do("reserve", lambda: f"one {item}")
        payment = await step.wait_for_event("payment", type="paid", timeout="30 days")
        return await step.do("ship", lambda: f"{item}, paid with {payment.payload['with']}, goes by mail")


async def fetch(request, env):
    order = request.json()
    instance = await env.WORKFLOWS.create(id=order["id"], params={"item": order["item"]})
    return {"id": instance.id}
