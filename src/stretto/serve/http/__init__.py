"""The HTTP server: OpenAI's protocol on the serving engine, in one process and one event loop.

`schemas` says what may be asked, `service` owns the engine and decides who is admitted, `replies` turns answers into
the protocol's bodies, `app` joins them to routes, `run` binds, serves and drains.
"""
