package pushmanager

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/jetstream"
)

const (
	storeOff      = "off"
	storeEmbedded = "embedded"

	// embeddedKey is the key in etcd that the one Push-Manager with an embedded store holds.
	embeddedKey = "/push-manager/store/embedded"
	// maxStoreTTL bounds how long a message may be kept.
	maxStoreTTL = 366 * 24 * time.Hour
	// besidePayload is what is stored beside the data and the metadata of a message: ids and names.
	besidePayload = 8 << 10
	// openTimeout bounds finding the messages of an embedded store: after a kill all of them are read, a million in 6 s.
	openTimeout = 5 * time.Minute
)

// storeConfig is the keys that begin with store.
type storeConfig struct {
	jetstream.Config // without Dir where the store is off, or elsewhere

	Where      string
	Directory  string
	Sync       string
	TTL        time.Duration
	Files      app.Certificates
	ServerName string
}

func (c *storeConfig) bind(s *config.Set) {
	s.Text(&c.Where, "store", storeOff, "Where messages wait for users who were not reached. off: nowhere, options.offline is refused. embedded: in this process, for a single Push-Manager. nats://HOST:PORT,...: in NATS JetStream (2.12 or later).")
	s.Text(&c.Directory, "store_dir", "push-manager-store", "Directory of an embedded store. One process has it at a time.")
	s.Choice(&c.Sync, "store_sync", "1s", "When an embedded store writes to the disk. always: before a message counts as stored, which then survives a power cut. 1s: each second; it survives the end of the process.", "1s", "always")
	s.DurationUpTo(&c.TTL, "store_ttl", 24*time.Hour, time.Second, maxStoreTTL, "How long messages without a ttl_ms of their own are kept.")
	s.DurationUpTo(&c.MaxTTL, "store_max_ttl", 168*time.Hour, time.Second, maxStoreTTL, "The longest ttl_ms that a push may ask for, and the longest time that a message is kept. Logs of rooms keep all messages for so long.")
	s.Int(&c.MaxPerUser, "store_max_per_user", 1000, 1, 1<<20, "Messages kept for a user; one more is refused. When it is lowered, users who have more lose their oldest ones.")
	s.Bytes(&c.MaxBytes, "store_max_bytes", 10<<30, 1<<20, 1<<50, "Size of all messages kept, on one replica. A quarter of it is for the logs of rooms, where the oldest messages make room for new ones; what does not fit into the rest is refused.")
	s.Auto(&c.Partitions, "store_partitions", 0, jetstream.MaxPartitions, "Streams that the messages of users are spread over, and those of rooms over as many. It cannot be changed once the store is made. auto: 1 embedded, 4 elsewhere.")
	s.Auto(&c.Replicas, "store_replicas", 0, 5, "Servers that keep each message. auto: 1 embedded, 3 elsewhere.")
	s.Text(&c.Username, "store_username", "", "User at NATS, where it asks for one.")
	s.Secret(&c.Password, "store_password", "Password at NATS.")
	s.Text(&c.CredentialsFile, "store_credentials_file", "", "File of credentials (a JWT and a seed) for NATS, in place of a user.")
	c.Files.Role = "store"
	c.Files.Bind(s, "store_tls", "ca_file", "PEM file of the authorities that the certificate of NATS is checked with; without one, those of the system. Any file of this section switches TLS on.")
	s.Text(&c.ServerName, "store_tls.server_name", "", "Name that the certificate of NATS must carry, in place of the host in store.")
}

func (c *storeConfig) on() bool       { return c.Where != storeOff }
func (c *storeConfig) embedded() bool { return c.Where == storeEmbedded }

// validate also fills in what the store is opened with.
func (c *storeConfig) validate(s *config.Set, risks *app.Risks) error {
	if c.TTL > c.MaxTTL {
		return s.Errorf("store_ttl", "%v is longer than store_max_ttl (%v)", c.TTL, c.MaxTTL)
	}
	c.SyncAlways = c.Sync == "always"
	if !c.on() || c.embedded() {
		where := "has no effect while store is " + c.Where
		for _, key := range []struct {
			name string
			set  bool
		}{
			{"store_username", c.Username != ""}, {"store_password", c.Password != ""}, {"store_credentials_file", c.CredentialsFile != ""},
			{"store_tls.ca_file", c.Files.On()}, {"store_tls.server_name", c.ServerName != ""}, {"store_replicas", c.embedded() && c.Replicas > 1},
		} {
			if key.set {
				return s.Errorf(key.name, "%s", where)
			}
		}
		if c.embedded() {
			c.Dir = c.Directory
		}
		return nil
	}
	if err := c.Files.Validate(s); err != nil {
		return err
	}
	switch {
	case c.Username != "" && c.Password == "":
		return s.Errorf("store_password", "missing, while store_username is set")
	case c.Username == "" && c.Password != "":
		return s.Errorf("store_username", "missing, while store_password is set")
	case c.Username != "" && c.CredentialsFile != "":
		return s.Errorf("store_credentials_file", "set, and store_username, too: one of them decides")
	}
	if c.CredentialsFile != "" {
		if _, err := os.Stat(c.CredentialsFile); err != nil {
			return s.Errorf("store_credentials_file", "%v", err)
		}
	}
	return c.validateURLs(s, risks)
}

func (c *storeConfig) validateURLs(s *config.Set, risks *app.Risks) error {
	secured := 0
	for text := range strings.SplitSeq(c.Where, ",") {
		text = strings.TrimSpace(text)
		if !strings.Contains(text, "://") && len(c.URLs) > 0 {
			text = "nats://" + text // as in nats://a:4222,b:4222
		}
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "nats" && u.Scheme != "tls" || u.Hostname() == "" || u.Path != "" || u.RawQuery != "" {
			return s.Errorf("store", "%q is none of off, embedded, nats://HOST:PORT,...", plain.Line(text, 64))
		}
		if u.User != nil {
			return s.Errorf("store", "has a user in it: use store_username and store_password")
		}
		if u.Port() == "" {
			u.Host = net.JoinHostPort(u.Hostname(), "4222")
		}
		if u.Scheme == "tls" || c.Files.On() {
			secured++
		} else if !config.Loopback(u.Hostname()) {
			if err := risks.Add("store", "NATS at %q is spoken to without TLS (STORE_TLS_CA_FILE)", u.Host); err != nil {
				return err
			}
		}
		c.URLs = append(c.URLs, u.String())
	}
	switch {
	case secured > 0 && secured < len(c.URLs):
		return s.Errorf("store", "some of the servers are spoken to over TLS, others are not")
	case secured == 0 && c.ServerName != "":
		return s.Errorf("store_tls.server_name", "set, while NATS is spoken to without TLS")
	}
	return nil
}

// openStore opens the store, if there is one, and puts the spool in front of it. It fills in what the engine and the entry
// in etcd have of it.
func (m *PushManager) openStore(ctx context.Context, cfg *Config) (err error) {
	c := &cfg.Store
	if !c.on() {
		return nil
	}
	if c.embedded() {
		if err := m.claimStore(ctx, cfg); err != nil {
			return err
		}
		cfg.Entry.Metadata = map[string]string{"store": storeEmbedded}
	} else if c.Files.On() || strings.HasPrefix(c.URLs[0], "tls://") {
		source, err := m.life.Certificates(c.Files)
		if err != nil {
			return err
		}
		c.TLS = source.ClientConfig(certs.Side{MinVersion: tls.VersionTLS12, ServerName: c.ServerName})
	}
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	opened, err := jetstream.Open(opening, c.Config)
	switch {
	case errors.Is(err, jetstream.ErrPartitions):
		return fmt.Errorf("STORE_PARTITIONS: %w", err)
	case errors.Is(err, jetstream.ErrReplicas):
		return fmt.Errorf("STORE_REPLICAS: %w", err)
	case err != nil && c.embedded():
		return fmt.Errorf("STORE_DIR: %w", err)
	case err != nil:
		return fmt.Errorf("STORE: %w", err)
	}
	m.store = opened
	m.life.Add("store", app.WithGrace(opened.Close))
	m.spool, err = store.NewSpool(opening, store.SpoolConfig{
		Store: opened, Usage: opened.Usage, Lanes: opened.Partitions(), Lane: opened.Partition, Logs: opened, LogUsage: opened.LogUsage,
		TTL: c.TTL, MaxTTL: c.MaxTTL, MaxBytes: c.UserBytes(), Logger: c.Logger, Metrics: c.Metrics,
	})
	if err != nil {
		return err
	}
	m.life.Add("spool", m.spool.Close)
	cfg.Engine.Spool = m.spool
	m.log.Info("messages of users who are not reached are stored", "in", c.Where, "survive", survives(opened.Durability()))
	return nil
}

// survives is a Durability in words.
func survives(d store.Durability) string {
	switch d {
	case store.OfProcess:
		return "the end of the process, not a power cut"
	case store.OfMachine:
		return "a power cut"
	case store.OfOneOfSeveral:
		return "the loss of any one machine"
	}
	return "nothing"
}

// claimStore makes sure that no other Push-Manager has an embedded store: users would be looked for in the wrong one. The
// holder of the claim is the directory, so a process that follows one that was killed need not wait.
func (m *PushManager) claimStore(ctx context.Context, cfg *Config) error {
	id, err := storeID(cfg.Store.Dir)
	if err != nil {
		return fmt.Errorf("STORE_DIR: %w", err)
	}
	taken := func(by string) error {
		return fmt.Errorf("STORE=embedded is for a single Push-Manager, and %q runs with it: use STORE=nats://... for several", by)
	}
	claim, err := discovery.Hold(ctx, discovery.ClaimConfig{
		Client: cfg.Discovery.Client, Key: embeddedKey, Holder: id, Name: cfg.ManagerID,
		RequestTimeout: cfg.Etcd.RequestTimeout, Logger: m.log,
	})
	if by, ok := errors.AsType[*discovery.TakenError](err); ok {
		return taken(by.Name)
	}
	if err != nil {
		return err
	}
	m.life.Add("claim of the store", app.WithTimeout(deregisterTimeout, claim.Close))
	ended, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case by := <-claim.Taken():
			m.fail(taken(by.Name))
		case <-ended:
		}
	}()
	m.life.Add("watch of the claim", app.Closing(func() {
		close(ended)
		<-watched
	}))
	return nil
}

// fail has the process end, unless something else has already.
func (m *PushManager) fail(err error) {
	select {
	case m.failed <- err:
	default:
	}
}

// storeID is the name of what is in a directory. It is made with it.
func storeID(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "id")
	id, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		id = []byte(rand.Text())
		err = os.WriteFile(path, id, 0o600)
	}
	switch {
	case err != nil:
		return "", err
	case len(id) < 16 || len(id) > 64:
		return "", fmt.Errorf("%s does not hold the name of a store", path)
	}
	return string(id), nil
}
