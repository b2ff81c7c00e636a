"""The engine half: the guard inside vLLM. The only package that imports vLLM.

Three classes are handed to vLLM by path (``guard.engine.launch`` does it): ``worker_cls`` reads and scores,
``scheduler_cls`` decides, the API server's ``middleware`` carries directives in and verdicts out.
"""
