//! Files, durably: temp file, fsync, rename, fsync of the folder.
//!
//! A daemon's account may put links and other files under the names in its own folders. There nothing is written, owners
//! and modes are changed through a handle only, and files are opened by [`open`], which follows no link.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, fchown, symlink};
use std::path::{Component, Path, PathBuf};

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::{exec, paths};
use crate::error::{At, Code, OrCode, Result};

/// Name of a file whose bytes are not all there yet.
pub const UNFINISHED: &str = ".zd-unfinished";
/// No file that zd reads whole is larger: an endless one must not fill the memory.
const MOST: u64 = 64 << 20;
/// Before the name of a user whose group may read what is root's.
pub const ROOT_AND: &str = "root:";

/// Who owns a file: a user of this host and its group, `root:` and the group of such a user, or root.
pub fn ids(owner: Option<&str>) -> Result<(u32, u32)> {
    let Some(owner) = owner else { return Ok((0, 0)) };
    if let Some(user) = owner.strip_prefix(ROOT_AND) {
        return ids(Some(user)).map(|(_, gid)| (0, gid));
    }
    // Our users are local; a static binary has no NSS.
    let passwd = fs::read_to_string("/etc/passwd").at("/etc/passwd")?;
    let fields = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>()).find(|f| f.first() == Some(&owner));
    let id = |i: usize| fields.as_ref().and_then(|f| f.get(i)?.parse().ok());
    match (id(2), id(3)) {
        (Some(uid), Some(gid)) => Ok((uid, gid)),
        _ => Err(Code::Io.err(format!("/etc/passwd has no user {owner}"))),
    }
}

/// Name of the user with this number; None is root.
pub fn user(uid: u32) -> Result<Option<String>> {
    if uid == 0 {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").at("/etc/passwd")?;
    let fields = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>());
    let mut named = fields.filter(|f| f.get(2).and_then(|id| id.parse().ok()) == Some(uid));
    let unknown = || Code::Io.err(format!("/etc/passwd has no user with number {uid}"));
    named.next().and_then(|f| f.first().map(|name| Some((*name).to_owned()))).ok_or_else(unknown)
}

pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).at(dir)
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Writes a whole file so that after a crash there is the old one or the new one.
pub fn write(path: &Path, bytes: &[u8], mode: u32, owner: Option<&str>) -> Result<()> {
    write_owned(path, bytes, mode, ids(owner)?)
}

pub fn write_owned(path: &Path, bytes: &[u8], mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
    let mut temp = temp_beside(path)?;
    temp.write_all(bytes).at(path)?;
    keep(temp, path, mode, (uid, gid))
}

/// As [`write`], for a name that came from outside: it is looked up beneath the handle of a folder of zd's own and
/// can lead nowhere else, whatever links lie there.
pub fn write_beneath(path: &Path, bytes: &[u8], mode: u32, owner: Option<&str>) -> Result<()> {
    let (uid, gid) = ids(owner)?;
    let own = [paths::ETC, paths::VAR, paths::LOG].into_iter().find(|own| path.starts_with(own));
    let own = own.ok_or_else(|| Code::Bug.err(format!("{} is no place of zd's", path.display())))?;
    let dir = Dir::open_ambient_dir(own, cap_std::ambient_authority()).at(own)?;
    let beneath = path.strip_prefix(own).unwrap_or(path);
    let folder = beneath.parent().filter(|p| *p != Path::new(""));
    let dir = dir.open_dir(folder.unwrap_or(Path::new("."))).at(path)?;
    let name = beneath.file_name().unwrap_or_default();
    let _ = dir.remove_file(UNFINISHED);
    let mut options = OpenOptions::new();
    let mut file = dir.open_with(UNFINISHED, options.write(true).create_new(true).mode(0o600)).at(path)?;
    file.write_all(bytes).at(path)?;
    let file = file.into_std();
    fchown(&file, Some(uid), Some(gid)).at(path)?;
    file.set_permissions(Permissions::from_mode(mode)).at(path)?;
    file.sync_all().at(path)?;
    dir.rename(UNFINISHED, &dir, name).at(path)?;
    sync_dir(parent(path))
}

/// A temporary file in the folder of `path`, mode 0600 until it is kept.
pub fn temp_beside(path: &Path) -> Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(".zd-").tempfile_in(parent(path)).at(path)
}

/// Gives a temporary file its owner, mode and name.
pub fn keep(temp: tempfile::NamedTempFile, path: &Path, mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
    fchown(temp.as_file(), Some(uid), Some(gid)).at(path)?;
    temp.as_file().set_permissions(Permissions::from_mode(mode)).at(path)?;
    temp.as_file().sync_all().at(path)?;
    temp.persist(path).map_err(|e| crate::error::io(path, e.error))?;
    sync_dir(parent(path))
}

/// Makes a symlink point elsewhere in one rename.
pub fn set_link(path: &Path, target: &Path) -> Result<()> {
    swap_link(path, target)?;
    sync_dir(parent(path))
}

/// As [`set_link`], but not yet on disk: for the moments in which clients wait.
pub fn swap_link(path: &Path, target: &Path) -> Result<()> {
    let temp = path.with_extension("zd-new");
    let _ = fs::remove_file(&temp);
    symlink(target, &temp).at(&temp)?;
    fs::rename(&temp, path).at(path)
}

/// The file's bytes, if there is one.
pub fn read_if_any(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(crate::error::io(path, e)),
    }
}

/// Opens a file to be read without following a link in any folder below zd's own: a daemon may write there. Elsewhere only
/// the name itself must be no link. Anything but a plain file with this one name is refused.
pub fn open(path: &Path) -> Result<File> {
    open_nofollow(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
        .and_then(|file| {
            let (file, plain) = (File::from(file), "a plain file with one name");
            let meta = file.metadata()?;
            if meta.is_file() && meta.nlink() <= 1 {
                Ok(file)
            } else {
                Err(std::io::Error::other(format!("expected {plain}")))
            }
        })
        .at(path)
}

/// As [`open`], and all that is in it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(MOST + 1).read_to_end(&mut bytes).at(path)?;
    if bytes.len() as u64 > MOST {
        return Err(Code::Io.err(format!("{} is larger than any file of its kind", path.display())));
    }
    Ok(bytes)
}

/// A handle of a daemon's socket, and a name that leads to what the handle has, whatever becomes of its own name.
pub fn socket(path: &Path) -> Result<(OwnedFd, PathBuf)> {
    use std::os::fd::AsRawFd;
    let file = File::from(open_nofollow(path, OFlags::PATH).at(path)?);
    if !file.metadata().at(path)?.file_type().is_socket() {
        return Err(Code::Io.err(format!("{} is no socket", path.display())));
    }
    let name = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    Ok((file.into(), name))
}

fn open_nofollow(path: &Path, how: OFlags) -> std::io::Result<OwnedFd> {
    const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
    let own = [paths::ETC, paths::VAR, paths::LOG, paths::RUN].map(Path::new);
    let own = own.into_iter().find(|own| path.starts_with(own)).unwrap_or(parent(path));
    let mut at = rustix::fs::openat(CWD, own, FOLDER, Mode::empty())?;
    let mut names = path.strip_prefix(own).unwrap_or(path).components().peekable();
    while let Some(Component::Normal(name)) = names.next() {
        let how = if names.peek().is_some() { FOLDER } else { how | OFlags::CLOEXEC };
        at = rustix::fs::openat(&at, name, how | OFlags::NOFOLLOW, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NOTDIR => std::io::Error::other("there is a link, which zd does not follow"),
            e => e.into(),
        })?;
    }
    Ok(at)
}

/// Mode and owner are as wanted.
pub fn looks_like(path: &Path, mode: u32, (uid, gid): (u32, u32)) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.mode() & 0o7777 == mode && m.uid() == uid && m.gid() == gid)
}

/// Makes a folder; one that is there gets mode and owner.
pub fn make_dir(path: &Path, mode: u32, owner: Option<&str>) -> Result<()> {
    if !path.is_dir() {
        fs::create_dir(path).at(path)?;
    }
    own_dir(path, mode, ids(owner)?)?;
    sync_dir(parent(path))
}

/// Gives a folder its mode and owner. In between everybody has the rights from before and those from now on: nginx looks
/// at the pointer meanwhile.
pub fn own_dir(path: &Path, mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
    let dir = File::open(path).at(path)?;
    let before = dir.metadata().at(path)?.mode() & 0o7777;
    for mode in [before | mode, mode] {
        fchown(&dir, Some(uid), Some(gid)).at(path)?;
        dir.set_permissions(Permissions::from_mode(mode)).at(path)?;
    }
    Ok(())
}

/// Gives all below a folder, and the folder, to another user and group. Links are not followed, and what has a further
/// name is left: it may be a file of somebody else's.
pub fn own_tree(path: &Path, ids: (u32, u32)) -> Result<()> {
    let root = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    root.and_then(|dir| own_handle(&dir, ids)).map_err(|e| crate::error::io(path, e.into()))
}

fn own_handle(handle: &OwnedFd, (uid, gid): (u32, u32)) -> rustix::io::Result<()> {
    let stat = rustix::fs::fstat(handle)?;
    let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if is_dir || stat.st_nlink <= 1 {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(
            handle,
            "",
            Some(uid),
            Some(gid),
            AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    if !is_dir {
        return Ok(());
    }
    for entry in rustix::fs::Dir::read_from(handle)? {
        let entry = entry?;
        let name = entry.file_name();
        if ![c".", c".."].contains(&name) {
            let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(handle, name, how, Mode::empty()) {
                Err(Errno::NOENT) => {}
                found => own_handle(&found?, (uid, gid))?,
            }
        }
    }
    Ok(())
}

/// Removes a file or symlink; gone is good.
pub fn remove_file(path: &Path) -> Result<()> {
    gone_is_good(fs::remove_file(path), path)
}

/// Removes a folder and all below it, or a file; gone is good. Symlinks are removed, not followed.
pub fn remove_tree(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    if is_dir { gone_is_good(fs::remove_dir_all(path), path) } else { remove_file(path) }
}

/// Copies a folder with owners, modes and times, so that `to` is whole or not there.
pub async fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let partial = to.with_extension("zd-partial");
    remove_tree(&partial)?;
    let (source, target) = (from.to_string_lossy(), partial.to_string_lossy());
    exec::run(&["cp", "-a", "--reflink=auto", "--", source.as_ref(), target.as_ref()]).await?;
    exec::run(&["sync", "-f", target.as_ref()]).await?;
    fs::rename(&partial, to).at(to)?;
    sync_dir(parent(to))
}

/// Detaches everything mounted beneath a path (umount(8), `--lazy`). Mounts of the same file systems in other
/// namespaces stay.
pub async fn unmount_beneath(path: &Path) -> Result<()> {
    let mounts = procfs::process::Process::myself().and_then(|own| own.mountinfo());
    let mounts = mounts.or_code(Code::Io, "/proc/self/mountinfo")?;
    for mount in mounts.into_iter().rev().filter(|mount| mount.mount_point.starts_with(path)) {
        exec::run(&[OsStr::new("umount"), OsStr::new("--lazy"), mount.mount_point.as_os_str()]).await?;
    }
    Ok(())
}

/// Removes a folder if it is empty; a folder with something in it stays.
pub fn remove_empty(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => gone_is_good(other, path),
    }
}

/// Removes all below a folder but not the folder itself.
pub fn empty_dir(path: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(path) else { return Ok(()) };
    for entry in entries {
        let entry = entry.at(path)?;
        if entry.file_type().at(path)?.is_dir() {
            remove_tree(&entry.path())?
        } else {
            remove_file(&entry.path())?
        }
    }
    Ok(())
}

fn gone_is_good(result: std::io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.at(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("secret"), "s").unwrap();
        assert_eq!(read(&at("secret")).unwrap(), b"s");
        symlink(at("secret"), at("link")).unwrap();
        assert!(read(&at("link")).unwrap_err().what.contains("a link, which zd does not follow"));
        fs::hard_link(at("secret"), at("second name")).unwrap();
        assert!(read(&at("second name")).unwrap_err().what.contains("a plain file with one name"));
        // Without NONBLOCK this would wait for a writer.
        rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(read(&at("fifo")).unwrap_err().what.contains("a plain file"));
        assert!(socket(&at("fifo")).is_err());
        let missing = open(&at("none")).unwrap_err().what;
        assert!(missing.contains("No such file"), "{missing}");
    }

    #[test]
    fn a_socket_is_reached_by_its_handle_after_its_name_was_given_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (_handle, name) = socket(&path).unwrap();
        fs::rename(&path, dir.path().join("b.sock")).unwrap();
        symlink("/dev/null", &path).unwrap();
        std::os::unix::net::UnixStream::connect(name).unwrap();
        assert!(listener.accept().is_ok());
        assert!(socket(&path).is_err());
    }
}
