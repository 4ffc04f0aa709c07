"""The error tree. A message says the rule, the values and the way out.

DeliaError
+-- ConfigError (ValueError)     a setting is unknown, ill-typed or contradicts another
+-- TaskFileError (ValueError)   a task file is malformed; names the file and the line
+-- ChatError (ValueError)       a template or a message can't be rendered to ids and a mask
+-- StoreError                   a directory is unfinished, foreign, too new or changed
+-- PoolError                    synthesis can't supply what was asked
+-- MixtureError (ValueError)    a ratio asks for more rows than the pool holds
+-- TrainError                   training can't go on: NaN, no trained token, a lost worker
+-- StoppedError                 a job was asked to stop, and did so where it can go on from
+-- EngineError                  an inference engine failed or refuses an adapter
|   +-- EngineDiedError          it failed as it ran and can't be asked again
+-- ExportError                  an exported adapter does not behave like the trained one
+-- GateError                    a promotion was refused
"""


class DeliaError(Exception):
    """Any error that this platform raises on purpose."""


class ConfigError(DeliaError, ValueError):
    """A setting is unknown, ill-typed or contradicts another."""


class TaskFileError(DeliaError, ValueError):
    """A task file is malformed; the message names the file and the line."""


class ChatError(DeliaError, ValueError):
    """A template or a message can't be rendered to token ids and a loss mask."""


class StoreError(DeliaError):
    """A stored directory is unfinished, of another kind, too new or changed."""


class PoolError(DeliaError):
    """Synthesis can't supply the rows that were asked for."""


class MixtureError(DeliaError, ValueError):
    """A mixture asks for more rows than its pool holds."""


class TrainError(DeliaError):
    """Training can't start or go on."""


class StoppedError(DeliaError):
    """A job was asked to stop, and did so where the same command goes on; its exit status is `STATUS`."""

    STATUS = 75
    """`EX_TEMPFAIL` of sysexits.h: a temporary failure, try again."""


class EngineError(DeliaError):
    """An inference engine failed, or refuses an adapter."""


class EngineDiedError(EngineError):
    """An inference engine failed as it ran; only another process can go on."""


class ExportError(DeliaError):
    """An exported adapter does not behave like the one that was trained."""


class GateError(DeliaError):
    """A promotion was refused."""
