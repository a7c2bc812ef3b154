"""The fields of a JobSet (v1alpha2, version 0.6 and later) and of its pods that our launch files use, and no others.

A cluster refuses some unknown fields and ignores others, which is worse: a misspelt `terminationGracePeriodSeconds`
would show when a checkpoint is lost. So every level forbids what it does not list. Facts from the definitions of
JobSet, Job and Pod; the text is our own.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

__all__ = ["JobSet"]

Label = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0, strict=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FailureRule(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[Literal["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]] = []
    targetReplicatedJobs: list[Label] = []


class FailurePolicy(Strict):
    maxRestarts: Count = 0
    restartStrategy: Literal["Recreate", "BlockingRecreate"] = "Recreate"
    rules: list[FailureRule] = []


class ExitCodes(Strict):
    containerName: Label | None = None
    operator: Literal["In", "NotIn"]
    values: Annotated[list[Annotated[int, Field(strict=True, ge=0, le=255)]], Field(min_length=1)]


class PodFailureRule(Strict):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: ExitCodes


class PodFailurePolicy(Strict):
    rules: list[PodFailureRule]


class FieldRef(Strict):
    fieldPath: str


class ValueFrom(Strict):
    fieldRef: FieldRef


class Variable(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]*$")]
    value: Annotated[str, Field(strict=True)] | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.value is None) == (self.valueFrom is None):
            raise ValueError(f"{self.name} needs value or valueFrom")
        return self


class ContainerPort(Strict):
    containerPort: Port


class Resources(Strict):
    limits: dict[str, int | str] = {}
    requests: dict[str, int | str] = {}


class VolumeMount(Strict):
    name: Label
    mountPath: str


class Container(Strict):
    name: Label
    image: str
    workingDir: str | None = None
    command: list[Annotated[str, Field(strict=True)]]
    env: list[Variable] = []
    ports: list[ContainerPort] = []
    resources: Resources
    volumeMounts: list[VolumeMount] = []


class Claim(Strict):
    claimName: Label


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""
    sizeLimit: str | None = None


class Volume(Strict):
    name: Label
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.persistentVolumeClaim is None) == (self.emptyDir is None):
            raise ValueError(f"volume {self.name} needs exactly one kind")
        return self


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    restartPolicy: Literal["Never", "OnFailure"]
    terminationGracePeriodSeconds: Count
    hostNetwork: bool = False
    dnsPolicy: Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"] = "ClusterFirst"
    nodeSelector: dict[str, str]
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _mounted_volumes_exist(self):
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        if mounted != {volume.name for volume in self.volumes}:
            raise ValueError("volumes and volumeMounts name different volumes")
        if self.hostNetwork and self.dnsPolicy != "ClusterFirstWithHostNet":
            raise ValueError("with hostNetwork the pods' names need dnsPolicy ClusterFirstWithHostNet")
        return self


class PodTemplate(Strict):
    spec: PodSpec


class JobSpec(Strict):
    parallelism: Annotated[int, Field(ge=1, strict=True)]
    completions: Annotated[int, Field(ge=1, strict=True)]
    completionMode: Literal["Indexed"]
    backoffLimit: Count
    podFailurePolicy: PodFailurePolicy
    template: PodTemplate

    @model_validator(mode="after")
    def _consistent(self):
        if self.parallelism != self.completions:
            raise ValueError("all processes run at once: parallelism must equal completions")
        if self.template.spec.restartPolicy != "Never":
            raise ValueError("podFailurePolicy needs restartPolicy: Never")
        names = {container.name for container in self.template.spec.containers}
        if not {rule.onExitCodes.containerName for rule in self.podFailurePolicy.rules} <= names | {None}:
            raise ValueError("podFailurePolicy names a container that there is not")
        return self


class JobTemplate(Strict):
    spec: JobSpec


class ReplicatedJob(Strict):
    name: Label
    replicas: Annotated[int, Field(ge=1, strict=True)] = 1
    template: JobTemplate


class JobSetSpec(Strict):
    failurePolicy: FailurePolicy
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1)]


class Metadata(Strict):
    name: Label
    annotations: dict[str, str] = {}


class JobSet(Strict):
    """A whole file."""

    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec
