//! The engine as an object that can be closed while others still point to it.
//! Knows no turn.

use crate::config::EngineConfig;
use crate::error::MkaError;
use crate::foreign::counted;
use crate::memory::NativeMemory;
use crate::scope::Scope;
use crate::session::{NativeSession, Sessions};
use crate::wait::wait;
use std::sync::{Arc, Mutex, PoisonError};

/// An open memory folder with its model.
#[derive(uniffi::Object)]
pub struct NativeEngine {
    /// None once it is closed.
    engine: Mutex<Option<mka::Engine>>,
    sessions: Arc<Sessions>,
}

impl NativeEngine {
    pub(crate) fn open_engine(&self, operation: &str) -> Result<mka::Engine, MkaError> {
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        engine.clone().ok_or_else(|| MkaError::closed(operation, "engine"))
    }

    fn new(engine: mka::Engine) -> Arc<Self> {
        Arc::new(Self { engine: Mutex::new(Some(engine)), sessions: Arc::default() })
    }
}

#[uniffi::export]
impl NativeEngine {
    /// Opens the memory folder at `path`, which is created if missing.
    #[uniffi::constructor]
    pub async fn open(path: String, config: EngineConfig) -> Result<Arc<Self>, MkaError> {
        Ok(Self::new(counted(config.builder(path)?.open()).await?))
    }

    /// `open`, blocking the thread.
    #[uniffi::constructor]
    pub fn open_blocking(path: String, config: EngineConfig) -> Result<Arc<Self>, MkaError> {
        Ok(Self::new(config.builder(path)?.open_blocking()?))
    }

    /// Opens the session of `scope`, new or continued where it stopped.
    pub async fn session(&self, scope: Scope) -> Result<Arc<NativeSession>, MkaError> {
        let engine = self.open_engine("session")?;
        self.sessions.enter("session", counted(engine.session(scope.into())).await?)
    }

    /// `session`, blocking the thread.
    pub fn session_blocking(&self, scope: Scope) -> Result<Arc<NativeSession>, MkaError> {
        wait(self.session(scope))
    }

    /// The memory of every scope.
    pub fn memory(self: Arc<Self>) -> Arc<NativeMemory> {
        Arc::new(NativeMemory::new(self))
    }

    /// Tokens of `text` as the model counts them; without a model one for every two bytes, as `context` counts.
    pub fn count_tokens(&self, text: String) -> Result<u64, MkaError> {
        Ok(self.open_engine("count_tokens")?.count_tokens(&text)? as u64)
    }

    /// Where the model runs.
    pub fn device(&self) -> Result<String, MkaError> {
        Ok(self.open_engine("device")?.device().to_string())
    }

    /// Name of the model's folder or file; none without a model.
    pub fn model_name(&self) -> Result<Option<String>, MkaError> {
        Ok(self.open_engine("model_name")?.model_name().map(str::to_owned))
    }

    /// Tokens that the model was trained on at once; none without a model.
    pub fn trained_tokens(&self) -> Result<Option<u64>, MkaError> {
        Ok(self.open_engine("trained_tokens")?.trained_tokens().map(|tokens| tokens as u64))
    }

    /// Bytes of keys and values that one token takes; none without a model.
    pub fn kv_bytes_per_token(&self) -> Result<Option<u64>, MkaError> {
        Ok(self.open_engine("kv_bytes_per_token")?.kv_bytes_per_token().map(|bytes| bytes as u64))
    }

    /// Closes the engine with its sessions, cancels their streams, and waits until the folder is free.
    /// Without effect the second time.
    pub async fn close(&self) -> Result<(), MkaError> {
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.sessions.close();
        match engine {
            Some(engine) => Ok(counted(engine.close()).await?),
            None => Ok(()),
        }
    }

    /// `close`, blocking the thread.
    pub fn close_blocking(&self) -> Result<(), MkaError> {
        wait(self.close())
    }
}
