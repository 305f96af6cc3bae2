//! The Container Runtime Interface, as kubelets speak it: blocking, and with the runtime's own words in its errors.

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::wait::wait_for;
use proto::runtime_service_client::RuntimeServiceClient;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub(super) mod proto {
    tonic::include_proto!("runtime.v1");
}

/// A runtime that listens on a Unix socket.
#[derive(Debug)]
pub struct Cri {
    runtime: Mutex<Runtime>,
    client: RuntimeServiceClient<Channel>,
}

/// What became of a command in a container.
#[derive(Clone, Debug)]
pub struct Executed {
    /// All it printed.
    pub stdout: String,
    /// All it complained about.
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
}

impl Cri {
    /// Nothing is connected before something is asked.
    pub(super) fn at(socket: &Path) -> Result<Cri> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let socket = socket.to_owned();
        let connect = service_fn(move |_: http::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let _entered = runtime.enter();
        // The address is not looked at.
        let endpoint = Endpoint::from_static("http://runtime").timeout(PATIENCE);
        let client = RuntimeServiceClient::new(endpoint.connect_with_connector_lazy(connect));
        drop(_entered);
        Ok(Cri {
            runtime: Mutex::new(runtime),
            client,
        })
    }

    /// Makes a pod's sandbox: its namespaces, and its network by way of the CNI plugins.
    pub(super) fn run_sandbox(&self, config: &proto::PodSandboxConfig) -> Result<String> {
        let config = Some(config.clone());
        let request = proto::RunPodSandboxRequest { config };
        let answer = self.ask("RunPodSandbox", async |mut it| {
            it.run_pod_sandbox(request).await
        })?;
        Ok(answer.pod_sandbox_id)
    }

    /// The addresses that the CNI plugins gave a sandbox.
    pub(super) fn addresses(&self, sandbox: &str) -> Result<Vec<String>> {
        let pod_sandbox_id = sandbox.to_owned();
        let request = proto::PodSandboxStatusRequest { pod_sandbox_id };
        let answer = self.ask("PodSandboxStatus", async |mut it| {
            it.pod_sandbox_status(request).await
        })?;
        let network = answer.status.and_then(|it| it.network).unwrap_or_default();
        let others = network.additional_ips.into_iter().map(|it| it.ip);
        let all = [network.ip].into_iter().chain(others);
        Ok(all.filter(|it| !it.is_empty()).collect())
    }

    /// Ends all of a pod, takes its network down, and forgets it.
    pub(super) fn remove_sandbox(&self, sandbox: &str) -> Result<()> {
        let pod_sandbox_id = sandbox.to_owned();
        let request = proto::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.ask("StopPodSandbox", async |mut it| {
            it.stop_pod_sandbox(request).await
        })?;
        let request = proto::RemovePodSandboxRequest { pod_sandbox_id };
        self.ask("RemovePodSandbox", async |mut it| {
            it.remove_pod_sandbox(request).await
        })?;
        Ok(())
    }

    /// Makes a container and starts it.
    pub(super) fn start(
        &self,
        sandbox: &str,
        config: proto::ContainerConfig,
        sandbox_config: &proto::PodSandboxConfig,
    ) -> Result<String> {
        let request = proto::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config.clone()),
        };
        let answer = self.ask("CreateContainer", async |mut it| {
            it.create_container(request).await
        })?;
        let container_id = answer.container_id;
        let request = proto::StartContainerRequest {
            container_id: container_id.clone(),
        };
        self.ask("StartContainer", async |mut it| {
            it.start_container(request).await
        })?;
        Ok(container_id)
    }

    /// Asks a container to end, and kills it if it has not after `patience`.
    pub(super) fn stop(&self, container: &str, patience: Duration) -> Result<()> {
        let request = proto::StopContainerRequest {
            container_id: container.to_owned(),
            timeout: i64::try_from(patience.as_secs())?,
        };
        self.ask("StopContainer", async |mut it| {
            it.stop_container(request).await
        })?;
        Ok(())
    }

    /// The exit code of a container that has ended; none: it runs.
    pub(super) fn exit_code(&self, container: &str) -> Result<Option<i32>> {
        let container_id = container.to_owned();
        let request = proto::ContainerStatusRequest { container_id };
        let answer = self.ask("ContainerStatus", async |mut it| {
            it.container_status(request).await
        })?;
        let status = answer.status.context("no status")?;
        let ended = status.state() == proto::ContainerState::ContainerExited;
        Ok(ended.then_some(status.exit_code))
    }

    /// Waits for a container's end, and gives its exit code.
    pub(super) fn wait(&self, container: &str, deadline: Duration) -> Result<i32> {
        wait_for("a container to end", deadline, || self.exit_code(container))
    }

    /// Runs a command in a container.
    pub fn execute(&self, container: &str, command: &[&str]) -> Result<Executed> {
        let request = proto::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: i64::try_from(PATIENCE.as_secs())?,
        };
        let answer = self.ask("ExecSync", async |mut it| it.exec_sync(request).await)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Executed {
            stdout: text(&answer.stdout),
            stderr: text(&answer.stderr),
            code: answer.exit_code,
        })
    }

    fn ask<T>(
        &self,
        what: &str,
        call: impl AsyncFnOnce(
            RuntimeServiceClient<Channel>,
        ) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T> {
        let runtime = self
            .runtime
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let answer = runtime.block_on(call(self.client.clone()));
        let answer = answer.map_err(|status| anyhow::anyhow!("{what}: {}", status.message()))?;
        Ok(answer.into_inner())
    }
}

/// Longer than a CNI plugin waits for anything.
const PATIENCE: Duration = Duration::from_secs(90);
