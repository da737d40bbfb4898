package jetstream

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// requestTimeout bounds one request, also where a caller's context has more time.
	requestTimeout = 5 * time.Second
	// firstTry is how long Open waits for servers elsewhere before it goes on without them.
	firstTry = 2 * time.Second
	// prepareTimeout bounds one attempt to find the streams, or to make them.
	prepareTimeout = 10 * time.Second
	// prepareAgain is the pause between attempts to find the streams.
	prepareAgain = time.Second
	// partitionsKey is in the metadata of each stream.
	partitionsKey = "push-manager-partitions"
)

// Errors of Open that no second attempt mends.
var (
	ErrPartitions = errors.New("the number of partitions is fixed when a store is made")
	ErrReplicas   = errors.New("a server that is not of a cluster keeps one replica")
)

var (
	_ store.Store = (*Store)(nil)
	_ store.Logs  = (*Store)(nil)
)

// Store is a store in JetStream.
type Store struct {
	// Static after Open.
	cfg     Config
	lock    *os.File       // of Dir
	srv     *server.Server // nil: elsewhere
	nc      *nats.Conn
	js      jetstream.JetStream
	corrupt *metrics.Counter
	stop    context.CancelFunc
	wg      sync.WaitGroup

	prepares chan struct{} // 1: streams have to be looked for

	streams  atomic.Pointer[[]jetstream.Stream] // of users, by partition; nil until all of them are there
	logs     atomic.Pointer[logStreams]         // of rooms, likewise
	receipts atomic.Pointer[receipts]           // nil: to be looked for
}

// Open opens a store, or makes it. Servers elsewhere may be away: then it returns, and its calls fail until they are back.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	cfg = cfg.withDefaults()
	s := &Store{cfg: cfg, corrupt: cfg.Metrics.GetOrCreateCounter("push_manager_store_corrupt_total"), stop: func() {}, prepares: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("store: %w", err), s.Close(context.WithoutCancel(ctx)))
		}
	}()
	if cfg.embedded() {
		if s.lock, err = lockDir(cfg.Dir); err != nil {
			return nil, err
		}
		if s.srv, err = startServer(ctx, serverOptions(&cfg), cfg.Logger); err != nil {
			return nil, err
		}
	}
	if err := s.connect(); err != nil {
		return nil, err
	}
	wait := firstTry
	if cfg.embedded() {
		wait = prepareTimeout
	}
	first, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	switch err := s.prepare(first); {
	case err == nil:
	case cfg.embedded() || permanent(err):
		return nil, err
	default:
		cfg.Logger.Warn("store: not reachable, trying again", "err", err)
		s.prepareSoon()
	}
	background, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.wg.Go(func() { s.prepareLoop(background) })
	return s, nil
}

func permanent(err error) bool { return errors.Is(err, ErrPartitions) || errors.Is(err, ErrReplicas) }

// prepareSoon has the streams looked for: servers that have come back may have lost them.
func (s *Store) prepareSoon() {
	select {
	case s.prepares <- struct{}{}:
	default:
	}
}

// prepareLoop prepares whenever that is due, and tries until the streams are there.
func (s *Store) prepareLoop(ctx context.Context) {
	for {
		select {
		case <-s.prepares:
			s.prepareUntil(ctx)
		case <-ctx.Done():
			return
		}
	}
}

func (s *Store) prepareUntil(ctx context.Context) {
	for last := ""; ctx.Err() == nil; pause(ctx, prepareAgain) {
		try, cancel := context.WithTimeout(ctx, prepareTimeout)
		err := s.prepare(try)
		cancel()
		switch {
		case err == nil:
			s.cfg.Logger.Info("store: reachable")
			return
		case ctx.Err() == nil && err.Error() != last:
			last = err.Error()
			level := slog.LevelWarn
			if permanent(err) {
				level = slog.LevelError
			}
			s.cfg.Logger.Log(ctx, level, "store: cannot be used, trying again", "err", err)
		}
	}
}

// connect makes the connection. It comes back by itself for as long as the Store is open.
func (s *Store) connect() error {
	log := s.cfg.Logger
	opts := []nats.Option{
		nats.Name("push-manager"),
		nats.Timeout(firstTry),
		nats.RetryOnFailedConnect(!s.cfg.embedded()),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(250*time.Millisecond, 250*time.Millisecond),
		nats.ReconnectBufSize(-1), // what cannot be sent has failed
		nats.PingInterval(5 * time.Second),
		nats.IgnoreAuthErrorAbort(), // a password may be put right
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("store: connection lost", "err", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			log.Info("store: connected again", "server", nc.ConnectedUrlRedacted())
			s.prepareSoon()
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("store: connection", "err", err) }),
	}
	if s.srv != nil {
		opts = append(opts, nats.InProcessServer(s.srv))
	}
	if s.cfg.TLS != nil {
		opts = append(opts, nats.Secure(s.cfg.TLS))
	}
	if s.cfg.Username != "" {
		opts = append(opts, nats.UserInfo(s.cfg.Username, s.cfg.Password))
	}
	if s.cfg.CredentialsFile != "" {
		opts = append(opts, nats.UserCredentials(s.cfg.CredentialsFile))
	}
	all := nats.GetDefaultOptions()
	all.Servers = s.cfg.URLs
	for _, opt := range opts {
		if err := opt(&all); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
	}
	var err error
	if s.nc, err = all.Connect(); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	s.js, err = jetstream.New(s.nc, jetstream.WithPublishAsyncMaxPending(maxPending), jetstream.WithPublishAsyncTimeout(requestTimeout))
	return err
}

// prepare finds the streams, makes those that are missing, and has all of them follow the configuration. Where those of rooms
// cannot be used, those of users can.
func (s *Store) prepare(ctx context.Context) error {
	if err := s.prepareUsers(ctx); err != nil {
		return err
	}
	return s.prepareLogs(ctx)
}

func (s *Store) prepareUsers(ctx context.Context) error {
	first, err := s.js.Stream(ctx, streamName(0))
	if errors.Is(err, nats.ErrReconnectBufExceeded) { // so it says that there is none
		return errors.New("no connection to a server, or none that lets us in")
	}
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("look for stream %s: %w", streamName(0), err)
	}
	if err == nil {
		if has := first.CachedInfo().Config.Metadata[partitionsKey]; has != strconv.Itoa(s.cfg.Partitions) {
			return fmt.Errorf("%w: this one has %q, not %d", ErrPartitions, has, s.cfg.Partitions)
		}
	}
	streams := make([]jetstream.Stream, s.cfg.Partitions)
	for p := range streams {
		if streams[p], err = s.createStream(ctx, s.streamConfig(p)); err != nil {
			return err
		}
		if s.cfg.Replicas > 1 {
			if err := s.putHead(ctx, p); err != nil {
				return fmt.Errorf("stream %s: %w", streamName(p), err)
			}
		}
	}
	s.streams.Store(&streams)
	return nil
}

// createStream makes a stream, or has it follow its configuration.
func (s *Store) createStream(ctx context.Context, cfg jetstream.StreamConfig) (jetstream.Stream, error) {
	stream, err := s.js.CreateOrUpdateStream(ctx, cfg)
	if api := (&jetstream.APIError{}); errors.As(err, &api) && api.ErrorCode == codeNotClustered {
		err = ErrReplicas
	}
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", cfg.Name, err)
	}
	return stream, nil
}

// streamConfig is a partition's of users. Shares of MaxBytes are equal: hashes are.
func (s *Store) streamConfig(p int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:                 streamName(p),
		Description:          "messages that wait for users",
		Subjects:             []string{subjectPrefix(p) + ">"},
		Storage:              jetstream.FileStorage,
		Replicas:             s.cfg.Replicas,
		Discard:              jetstream.DiscardNew,
		DiscardNewPerSubject: true,
		MaxMsgsPerSubject:    int64(s.cfg.MaxPerUser),
		MaxBytes:             int64(max(s.cfg.UserBytes()/s.cfg.Partitions, 1)),
		MaxAge:               s.cfg.MaxTTL,
		AllowMsgTTL:          true,
		AllowRollup:          true, // for collapse keys
		AllowDirect:          true,
		Duplicates:           100 * time.Millisecond, // the least: nothing here has an id of NATS
		Metadata:             map[string]string{partitionsKey: strconv.Itoa(s.cfg.Partitions)},
	}
}

// putHead stores the message head where it is missing.
func (s *Store) putHead(ctx context.Context, p int) error {
	head := nats.NewMsg(headSubject(p))
	head.Header.Set(jetstream.MsgTTLHeader, "never")
	_, err := s.js.PublishMsg(ctx, head, jetstream.WithExpectLastSequencePerSubject(0))
	if api := (&jetstream.APIError{}); errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return nil
	}
	return err
}

// Partitions is their number.
func (s *Store) Partitions() int { return s.cfg.Partitions }

// Partition is that of a user, or of a room.
func (s *Store) Partition(id string) int {
	p, _ := s.hash(id)
	return p
}

// place is where a user's messages are: the partition, and the prefix of their subjects.
func (s *Store) place(user string) (p int, prefix string) {
	p, token := s.hash(user)
	return p, subjectPrefix(p) + token + "."
}

// hash is the partition of an id, and what stands for the id in subjects.
func (s *Store) hash(id string) (p int, text string) {
	sum := sha256.Sum256([]byte(id))
	return int(binary.BigEndian.Uint64(sum[16:24]) % uint64(s.cfg.Partitions)), token(sum)
}

// What follows a user's prefix: nothing else than plainSuffix, or keyedSuffix and the token of a collapse key.
const (
	plainSuffix = "m"
	keyedSuffix = "k."
)

// subjectOf is the subject of a message of somebody with this prefix.
func subjectOf(prefix, collapseKey string) string {
	if collapseKey == "" {
		return prefix + plainSuffix
	}
	return prefix + keyedSuffix + token(sha256.Sum256([]byte(collapseKey)))
}

func token(sum [sha256.Size]byte) string { return base64.RawURLEncoding.EncodeToString(sum[:16]) }

func streamName(p int) string    { return "PM_INBOX_" + strconv.Itoa(p) }
func subjectPrefix(p int) string { return "pmi." + strconv.Itoa(p) + "." }
func headSubject(p int) string   { return subjectPrefix(p) + "head" }

// Durability implements store.Store.
func (s *Store) Durability() store.Durability {
	switch {
	case s.cfg.Replicas > 1:
		return store.OfOneOfSeveral
	case s.cfg.embedded() && s.cfg.SyncAlways:
		return store.OfMachine
	}
	return store.OfProcess
}

// Usage is the bytes that one replica of a partition keeps for users. Its leader says so, which tells that it is there.
func (s *Store) Usage(ctx context.Context, partition int) (int64, error) {
	streams, err := s.ready()
	if err != nil {
		return 0, err
	}
	return s.usage(ctx, streams[partition])
}

// LogUsage is Usage for rooms.
func (s *Store) LogUsage(ctx context.Context, partition int) (int64, error) {
	logs, err := s.readyLogs()
	if err != nil {
		return 0, err
	}
	return s.usage(ctx, logs.streams[partition])
}

// usage is asked every few seconds, so it is here that a stream is missed which somebody has deleted.
func (s *Store) usage(ctx context.Context, stream jetstream.Stream) (int64, error) {
	info, err := stream.Info(ctx)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s.prepareSoon()
	}
	if err != nil {
		return 0, down(err)
	}
	return int64(info.State.Bytes), nil
}

// ready returns the streams of users.
func (s *Store) ready() ([]jetstream.Stream, error) {
	streams := s.streams.Load()
	if streams == nil {
		return nil, engine.ErrSpoolDown
	}
	return *streams, nil
}

// down is an engine.ErrSpoolDown with its reason for the log.
func down(err error) error { return fmt.Errorf("%w: %w", engine.ErrSpoolDown, err) }

// Close ends the connection, and an embedded server, which takes as long as writing what it knows about its messages. At the
// end of ctx it is left behind: then the next start reads all messages.
func (s *Store) Close(ctx context.Context) error {
	s.stop()
	s.wg.Wait()
	if s.nc != nil {
		s.nc.Close()
	}
	closed := make(chan error, 1)
	go func() {
		if s.srv != nil {
			stopServer(s.srv)
		}
		if s.lock != nil {
			closed <- s.lock.Close()
		}
		close(closed)
	}()
	select {
	case err := <-closed:
		return err
	case <-ctx.Done():
		return fmt.Errorf("store: stop the embedded server: %w", context.Cause(ctx))
	}
}
