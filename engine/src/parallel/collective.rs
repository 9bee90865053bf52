//! Several processes as one: sums over all of them, in the order of their ranks.
//! Knows no parameter; a process learns its place from the variables that torchrun, mpirun and SLURM scripts set.

use crate::Device;
use crate::error::{Error, ErrorKind, Result};
use candle_core::Tensor;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Processes that train one model on different data, or share one model.
///
/// Every process calls the same operations in the same order; results are the same bits on each.
pub trait Collective: Send {
    /// This process, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn world_size(&self) -> usize;

    /// Replaces `values` by their sum over all processes, in f32.
    ///
    /// # Errors
    /// If another process is gone or sends another number of values.
    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<()>;

    /// The sum of `values` (n), f32, over all processes, on their device; to be read after [`Collective::settle`].
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`], and if the device fails.
    fn all_reduce_tensor(&mut self, values: Tensor) -> Result<Tensor> {
        let mut sum = values.to_vec1::<f32>()?;
        self.all_reduce_sum(&mut sum)?;
        Ok(Tensor::from_vec(sum, values.shape(), values.device())?)
    }

    /// Makes what a device does from now on see the sums that were asked for.
    ///
    /// # Errors
    /// If the device fails.
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    /// The processes that call this with the same `group`, as a collective of their own, ranked as they are here.
    ///
    /// # Errors
    /// If another process is gone, and for a collective that cannot be split: the default.
    fn split(&mut self, group: usize) -> Result<Box<dyn Collective>> {
        let processes = self.world_size();
        Err(Error::invalid(format!(
            "collective: group {group} of {processes} processes, expected a collective that can be split"
        )))
    }
}

/// The group that RANK, WORLD_SIZE, MASTER_ADDR (127.0.0.1) and MASTER_PORT (29500) name; none without WORLD_SIZE or
/// where it is 1.
///
/// Gradients on a CUDA device travel through NCCL in a build with the feature `nccl`, else through TCP.
///
/// # Errors
/// As [`TcpCollective::from_env`], and if NCCL cannot be used.
pub fn group_from_env(device: Device) -> Result<Option<Box<dyn Collective>>> {
    let Some(group) = TcpCollective::from_env()? else { return Ok(None) };
    #[cfg(feature = "nccl")]
    if let Device::Cuda(ordinal) = device {
        return Ok(Some(Box::new(super::nccl::NcclCollective::join(group, ordinal)?)));
    }
    let _ = device;
    Ok(Some(Box::new(group)))
}

/// Where this process's model runs: the card of LOCAL_RANK, as torchrun and its like number the processes of a machine;
/// without it, or on a machine without cards, [`Device::auto`].
///
/// # Errors
/// If LOCAL_RANK is no number.
pub fn local_device() -> Result<Device> {
    match std::env::var("LOCAL_RANK") {
        Ok(local) if Device::available().len() > 1 => format!("cuda:{local}").parse(),
        _ => Ok(Device::auto()),
    }
}

/// One process alone.
pub(crate) struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn split(&mut self, _: usize) -> Result<Box<dyn Collective>> {
        Ok(Box::new(Alone))
    }
}

/// Processes over TCP: rank 0 adds up in the order of ranks and sends the sum back.
///
/// Fit for processes of one machine or a fast local network; 4 bytes a value travel up and down each step.
#[derive(Debug)]
pub struct TcpCollective {
    rank: usize,
    world_size: usize,
    /// Rank 0: the others in order. Others: rank 0.
    peers: Vec<TcpStream>,
}

/// First bytes of a connection, before the rank and the number of processes.
const HELLO: &[u8; 8] = b"mka-tcp1";
/// How long a process waits for the others to start, and for a message.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a new connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(2);

impl TcpCollective {
    /// Joins the group that RANK, WORLD_SIZE, MASTER_ADDR (127.0.0.1) and MASTER_PORT (29500) name; none without
    /// WORLD_SIZE or where it is 1. Under torchrun, whose store listens on MASTER_PORT, the port behind it is used.
    ///
    /// # Errors
    /// If a variable is no number or the others do not come within two minutes.
    pub fn from_env() -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Ok(text) = std::env::var(name) else { return Ok(None) };
            let parsed = text.parse();
            parsed.map(Some).map_err(|_| {
                Error::invalid(format!("environment: {name} {text:?}, expected a number"))
            })
        };
        let Some(world_size) = number("WORLD_SIZE")?.filter(|size| *size > 1) else {
            return Ok(None);
        };
        let rank = number("RANK")?.ok_or_else(|| {
            Error::invalid(format!("environment: WORLD_SIZE {world_size} without RANK"))
        })?;
        let address = std::env::var("MASTER_ADDR").unwrap_or_else(|_| "127.0.0.1".into());
        // torchrun's own store listens on the port that it names: the next one is taken.
        let is_taken = std::env::var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|it| it == "True");
        let port = number("MASTER_PORT")?.unwrap_or(29500) + usize::from(is_taken);
        Self::join(&address, port, rank, world_size).map(Some)
    }

    /// Joins a group of `world_size` processes as `rank`; rank 0 listens on `address` and `port`.
    ///
    /// # Errors
    /// If the address cannot be used or the others do not come within two minutes.
    pub fn join(address: &str, port: usize, rank: usize, world_size: usize) -> Result<Self> {
        let port = u16::try_from(port)
            .map_err(|_| Error::invalid(format!("port {port}, expected below 65536")))?;
        if rank >= world_size {
            return Err(Error::invalid(format!(
                "rank {rank}, expected below the {world_size} processes"
            )));
        }
        let peers = match rank {
            0 => accept(&listen(address, port)?, world_size)?,
            _ => vec![connect(address, port, rank, world_size)?],
        };
        Ok(Self { rank, world_size, peers })
    }

    /// The processes that call this with the same `group`, over connections of their own.
    ///
    /// The first of a group listens where its connection to the others of this one begins, on a free port.
    ///
    /// # Errors
    /// If another process is gone, or no port can be opened.
    pub fn split(&mut self, group: usize) -> Result<Self> {
        let mut groups = vec![0.0; self.world_size];
        groups[self.rank] = group as f32;
        self.all_reduce_sum(&mut groups)?;
        let members: Vec<usize> =
            (0..self.world_size).filter(|rank| groups[*rank] == group as f32).collect();
        let (leader, world_size) = (members[0], members.len());
        let rank = members.iter().position(|member| *member == self.rank).unwrap_or(0);
        // Every process hears where every first one listens; the others add zeros.
        let mut places = vec![0.0; PLACE * self.world_size];
        let listener = match self.rank == leader && world_size > 1 {
            true => {
                let here = |source| failed("local address".into(), source);
                let address = self.peers[0].local_addr().map_err(here)?.ip();
                let listener = listen(&address.to_string(), 0)?;
                let port = listener.local_addr().map_err(here)?.port();
                let bytes = octets(address).into_iter().chain(port.to_be_bytes());
                let mine = &mut places[PLACE * leader..PLACE * (leader + 1)];
                mine.iter_mut().zip(bytes).for_each(|(place, byte)| *place = f32::from(byte));
                Some(listener)
            }
            false => None,
        };
        self.all_reduce_sum(&mut places)?;
        let peers = match listener {
            Some(listener) => accept(&listener, world_size)?,
            None if world_size == 1 => Vec::new(),
            None => {
                let mut place = [0u8; PLACE];
                let sent = &places[PLACE * leader..];
                place.iter_mut().zip(sent).for_each(|(byte, place)| *byte = *place as u8);
                let [address @ .., high, low] = place;
                let address = Ipv6Addr::from(address).to_canonical().to_string();
                vec![connect(&address, u16::from_be_bytes([high, low]), rank, world_size)?]
            }
        };
        Ok(Self { rank, world_size, peers })
    }
}

#[cfg(test)]
impl TcpCollective {
    /// `world_size` of them for the threads of one process, on a port that nobody else has.
    pub(crate) fn of_threads(world_size: usize) -> Result<Vec<Self>> {
        let listener = listen("127.0.0.1", 0)?;
        let at = listener.local_addr().map_err(|source| failed("local address".into(), source))?;
        let others: Vec<Self> = (1..world_size)
            .map(|rank| {
                let peers = vec![connect("127.0.0.1", at.port(), rank, world_size)?];
                Ok(Self { rank, world_size, peers })
            })
            .collect::<Result<_>>()?;
        let first = Self { rank: 0, world_size, peers: accept(&listener, world_size)? };
        Ok(std::iter::once(first).chain(others).collect())
    }
}

/// Numbers that say where a process listens: 16 bytes of address, two of port.
const PLACE: usize = 18;

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn failed(what: String, source: std::io::Error) -> Error {
    Error::new(ErrorKind::Device, format!("collective: {what}: {source}")).with_source(source)
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn listen(address: &str, port: u16) -> Result<TcpListener> {
    let at = |source| failed(format!("listen on {address}:{port}"), source);
    let listener = TcpListener::bind((address, port)).map_err(at)?;
    listener.set_nonblocking(true).map_err(at)?;
    Ok(listener)
}

/// The processes above rank 0 of `world_size`, in order.
fn accept(listener: &TcpListener, world_size: usize) -> Result<Vec<TcpStream>> {
    let mut peers: Vec<Option<TcpStream>> = (1..world_size).map(|_| None).collect();
    let started = Instant::now();
    while peers.iter().any(Option::is_none) {
        if started.elapsed() > PATIENCE {
            let here = peers.iter().flatten().count();
            return Err(Error::new(
                ErrorKind::Device,
                format!(
                    "collective: {here} of {} processes came within two minutes",
                    world_size - 1
                ),
            ));
        }
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        let mut hello = [0u8; 24];
        // A stranger on the port is not let in and does not keep the others waiting.
        let greeted = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(GREETING)))
            .and_then(|()| stream.read_exact(&mut hello));
        if greeted.is_err() || &hello[..8] != HELLO {
            continue;
        }
        prepare(&stream).map_err(|source| failed("prepare a connection".into(), source))?;
        let word = |at: usize| u64::from_le_bytes(hello[at..at + 8].try_into().expect("8 bytes"));
        let rank = word(8) as usize;
        match peers.get_mut(rank.wrapping_sub(1)).filter(|_| word(16) == world_size as u64) {
            Some(place) if place.is_none() => *place = Some(stream),
            _ => {
                return Err(Error::invalid(format!(
                    "collective: a process of rank {rank} of {}, expected ranks 1 to {} once each",
                    word(16),
                    world_size - 1
                )));
            }
        }
    }
    Ok(peers.into_iter().flatten().collect())
}

fn connect(address: &str, port: u16, rank: usize, world_size: usize) -> Result<TcpStream> {
    let started = Instant::now();
    loop {
        let stream = TcpStream::connect((address, port)).and_then(|mut stream| {
            prepare(&stream)?;
            let mut hello = HELLO.to_vec();
            hello.extend((rank as u64).to_le_bytes());
            hello.extend((world_size as u64).to_le_bytes());
            stream.write_all(&hello)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => return Ok(stream),
            Err(source) if started.elapsed() > PATIENCE => {
                return Err(failed(format!("connect to {address}:{port}"), source));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn send(stream: &mut TcpStream, values: &[f32]) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(8 + 4 * values.len());
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    stream.write_all(&bytes)
}

/// Reads as many values as `expected`; another number is an error of the other side.
fn receive(stream: &mut TcpStream, expected: usize) -> std::io::Result<Vec<f32>> {
    let mut length = [0u8; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length != expected as u64 {
        return Err(std::io::Error::other(format!("{length} values, expected {expected}")));
    }
    let mut bytes = vec![0u8; 4 * expected];
    stream.read_exact(&mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

impl Collective for TcpCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<()> {
        let lost = |what: &str| {
            let what = what.to_owned();
            move |source| failed(what, source)
        };
        if self.rank > 0 {
            let master = &mut self.peers[0];
            send(master, values).map_err(lost("send to rank 0"))?;
            let sum = receive(master, values.len()).map_err(lost("receive from rank 0"))?;
            values.copy_from_slice(&sum);
            return Ok(());
        }
        for (i, peer) in self.peers.iter_mut().enumerate() {
            let theirs = receive(peer, values.len())
                .map_err(lost(&format!("receive from rank {}", i + 1)))?;
            values.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
        }
        for (i, peer) in self.peers.iter_mut().enumerate() {
            send(peer, values).map_err(lost(&format!("send to rank {}", i + 1)))?;
        }
        Ok(())
    }

    fn split(&mut self, group: usize) -> Result<Box<dyn Collective>> {
        Ok(Box::new(Self::split(self, group)?))
    }
}
