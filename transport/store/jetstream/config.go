package jetstream

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// MaxPartitions bounds Config.Partitions: each is a stream with memory of its own, and the more there are the dearer reads become.
const MaxPartitions = 64

// Config says where the messages are kept, and how many. Dir or URLs must be set; zero values of the rest stand for the defaults.
type Config struct {
	// Dir is the directory of an embedded server. One process has it at a time.
	Dir string
	// SyncAlways has an embedded server write each message to the disk before it is acknowledged; it does so every
	// second without.
	SyncAlways bool

	// URLs are servers elsewhere, of one cluster.
	URLs []string
	// TLS secures the connection to them. nil: plain, unless a URL begins with tls.
	TLS *tls.Config
	// Username and Password, or CredentialsFile, where they ask for them.
	Username, Password string
	CredentialsFile    string

	// Partitions is the number of streams for users, and of those for rooms. It must be that of the store that is there. Default 1 embedded, 4 elsewhere.
	Partitions int
	// Replicas of each stream. Default 1 embedded, 3 elsewhere.
	Replicas int
	// MaxPerUser is the number of messages kept for a user, those with a collapse key aside. Default 1,000.
	MaxPerUser int
	// MaxPerRoom is the number of messages kept in the log of a room: one more takes the place of the oldest. A larger number than
	// before hides what was dropped under the smaller one. Default 10,000.
	MaxPerRoom int
	// MaxBytes is the size of all messages together, on one replica. A quarter of it is for the logs of rooms, where
	// the oldest messages make room for new ones. The rest is for users. Default 10 GiB.
	MaxBytes int
	// ReceiptBytes is the size of all receipts together, on one replica, and MaxReceipts their number of one sender. Default a tenth
	// of MaxBytes, 1 GiB at the most, and 100,000.
	ReceiptBytes, MaxReceipts int
	// MaxTTL is how long a message is kept at most. The log of a room keeps all messages for so long, the expired ones, too. Default 168 h.
	MaxTTL time.Duration
	// MaxMessageBytes is the largest message of an embedded server, with all that is stored beside the payload. Default 1 MiB.
	MaxMessageBytes int

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

func (c Config) withDefaults() Config {
	partitions, replicas := 4, 3
	if c.embedded() {
		partitions, replicas = 1, 1
	}
	defaultTo(&c.Partitions, partitions)
	defaultTo(&c.Replicas, replicas)
	defaultTo(&c.MaxPerUser, 1000)
	defaultTo(&c.MaxPerRoom, 10_000)
	defaultTo(&c.MaxBytes, 10<<30)
	defaultTo(&c.ReceiptBytes, min(max(c.MaxBytes/10, 64<<10), 1<<30))
	defaultTo(&c.MaxReceipts, maxReceipts)
	defaultTo(&c.MaxTTL, 168*time.Hour)
	defaultTo(&c.MaxMessageBytes, 1<<20)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

func defaultTo[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// logShare is the part of MaxBytes that is for the logs of rooms: one in so many.
const logShare = 4

// UserBytes is the part of MaxBytes that is for users.
func (c *Config) UserBytes() int { return c.MaxBytes - c.logBytes() }

func (c *Config) logBytes() int { return c.MaxBytes / logShare }

func (c *Config) embedded() bool { return c.Dir != "" }

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.embedded() == (len(c.URLs) > 0) {
		errs = append(errs, errors.New("one of Dir and URLs must be set"))
	}
	if c.embedded() && c.Replicas > 1 {
		errs = append(errs, errors.New("Replicas: an embedded store has one"))
	}
	for _, number := range []struct {
		name      string
		value, hi int
	}{
		{"Partitions", c.Partitions, MaxPartitions}, {"Replicas", c.Replicas, 5}, {"MaxPerUser", c.MaxPerUser, math.MaxInt}, {"MaxPerRoom", c.MaxPerRoom, math.MaxInt},
		{"MaxBytes", c.MaxBytes, math.MaxInt}, {"MaxMessageBytes", c.MaxMessageBytes, 64 << 20},
		{"ReceiptBytes", c.ReceiptBytes, math.MaxInt}, {"MaxReceipts", c.MaxReceipts, math.MaxInt},
	} {
		if number.value < 0 || number.value > number.hi {
			errs = append(errs, fmt.Errorf("%s: %d is not from 1 to %d", number.name, number.value, number.hi))
		}
	}
	if c.MaxTTL < 0 || c.MaxTTL > 0 && c.MaxTTL < time.Second {
		errs = append(errs, errors.New("MaxTTL is under a second"))
	}
	return errors.Join(errs...)
}
